"""Saved outputs, one JSON object {"id": ..., "text": ...} a line, and the items that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sif_ray.evaluate.benchmarks.files import Row, read_rows
from sif_ray.evaluate.benchmarks.item import Item, Reply, numbered


@dataclass(frozen=True)
class Matched:
    """A reply to every item, in the order of the items, and what did not match."""

    replies: tuple[Reply, ...]
    missing: tuple[str, ...]  # ids without a prediction; their reply is ""
    surplus: tuple[str, ...]  # ids of predictions that no item has; not scored


def match(items: Sequence[Item], path: Path) -> Matched:
    """Give every item its text of a file of predictions.

    Raises `ConfigError` with file, line and field for a wrong line, and for an id that is predicted more often than it
    is asked (MME asks twice under one id; its predictions then come in the order of its questions).
    """
    wanted = {item.item_id for item in items}
    seen: Counter[str] = Counter()
    texts: dict[str, str] = {}
    for row in read_rows(path):
        own, text = _prediction(row)
        seen[own] += 1
        item_id = numbered(own, seen[own])
        if item_id in texts or (seen[own] > 1 and item_id not in wanted):
            raise row.error("id", f"is {own!r} once more; keep one line for each id")
        texts[item_id] = text
    return Matched(
        replies=tuple(Reply(item, texts.get(item.item_id, "")) for item in items),
        missing=tuple(item.item_id for item in items if item.item_id not in texts),
        surplus=tuple(item_id for item_id in texts if item_id not in wanted),
    )


def _prediction(row: Row) -> tuple[str, str]:
    own, text = row.value("id"), row.fields.get("text")
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise row.error("id", f"is {own!r:.80}; expected a text")
    if not isinstance(text, str):
        raise row.error("text", f"is {text!r:.80}; expected the model's output as a text")
    return str(own), text
