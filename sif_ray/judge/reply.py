"""The reply of an LLM judge: the form it is asked for, and how its score is read."""

from __future__ import annotations

import json
import re
from typing import Any

RESPONSE_FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
            "required": ["score"],
            "additionalProperties": False,
        },
    },
}
"""`response_format` of a chat completion. Servers without structured output ignore it; hence `read_score`."""

CUT_REPLY, UNREADABLE_REPLY = "cut reply", "unreadable reply"
"""Why a reply holds no score: reasons of a `CallError` and of an `sif_ray.judge.outcome.Failed`."""

_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def read_score(reply: str) -> float:
    """The score, in [0, 1], of a reply that is JSON with the key "score" or a bare number, in a ```json fence or not.

    Raises `ValueError` for anything else, a number outside [0, 1] included: that is no score, and not the score 0.
    """
    fenced = _FENCED.fullmatch(reply.strip())
    value = json.loads(fenced[1] if fenced else reply)
    score = value.get("score") if isinstance(value, dict) else value
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"the reply {reply[:200]!r} holds no score in [0, 1]")
    return float(score)
