"""What counts as a score, and what does not."""

from __future__ import annotations

import pytest

from sif_ray.judge.reply import read_score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 0.8}', 0.8),
        (' {"score":1}\n', 1.0),
        ('```json\n{"score": 0.25}\n```', 0.25),
        ("```\n0.5\n```", 0.5),
        ("0", 0.0),
        ("1.0", 1.0),
        ('{"why": "close", "score": 1e-1}', 0.1),
    ],
)
def test_forms_of_a_score(reply, score):
    assert read_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "The score is 0.8",
        '{"score": 0.8',
        '{"score": "0.8"}',
        '{"score": null}',
        '{"score": true}',
        '{"score": 8}',
        '{"score": -0.1}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"rating": 0.8}',
        "[0.8]",
        "true",
        "null",
        "80%",
        "```json\n0.5\n``` or ```json\n0.6\n```",
    ],
)
def test_anything_else_is_no_score(reply):
    with pytest.raises(ValueError):
        read_score(reply)
