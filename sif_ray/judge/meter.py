"""What the calls of a model cost."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

LATENCY_WINDOW = 1000  # calls


class Meter:
    """Counts the attempts of one caller and what came of them."""

    def __init__(self, name: str, usd_per_million_tokens: Sequence[float]) -> None:
        """`name`, e.g. "judge", begins the names of the metrics; the prices are those of prompt and of reply tokens."""
        self._name = name
        self._usd_in, self._usd_out = (price / 1e6 for price in usd_per_million_tokens)
        self._counts: Counter[str] = Counter()
        self._latencies_s: deque[float] = deque(maxlen=LATENCY_WINDOW)

    def count(self, what: str) -> None:
        """Add one to the total `what`, e.g. "cached" or "error/rate limit"."""
        self._counts[what] += 1

    def attempt(self, number: int, latency_s: float, tokens_in: int, tokens_out: int, error: str) -> None:
        """The attempt `number` (1 = first) of a call; `error` is why it failed, "" if it did not."""
        self._counts.update(calls=1, retries=number > 1, tokens_in=tokens_in, tokens_out=tokens_out)
        if error:
            self.count(f"error/{error}")
        self._latencies_s.append(latency_s)

    def metrics(self) -> dict[str, float]:
        """Totals as "<name>/<what>"; cost in US dollars; latency, in seconds, of the last `LATENCY_WINDOW` calls."""
        totals = {what.replace(" ", "_"): float(count) for what, count in sorted(self._counts.items())}
        totals["usd"] = self._usd_in * self._counts["tokens_in"] + self._usd_out * self._counts["tokens_out"]
        if self._latencies_s:
            totals["latency_mean_s"] = float(np.mean(self._latencies_s))
            totals["latency_p95_s"] = float(np.percentile(self._latencies_s, 95))
        return {f"{self._name}/{what}": value for what, value in totals.items()}
