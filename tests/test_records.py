"""A rollout that contradicts itself cannot be made."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from sif_ray.records import RecordError, Rollout, RolloutGroup


def _rollout(**changes: Any) -> Rollout:
    parts: dict[str, Any] = {
        "token_ids_T": np.arange(5, dtype=np.int32),
        "logprobs_T": np.array([-0.5, 0.0, -3.0, -1e-7, -20.0], dtype=np.float32),
        "version_spans": ((3, 4), (4, 1)),
        "finish_reason": "stop",
        "text": "five",
    }
    return Rollout(**(parts | changes))


def _group(**changes: Any) -> RolloutGroup:
    parts: dict[str, Any] = {
        "ticket_id": "t",
        "sample_id": "s",
        "prompt_token_ids_P": np.arange(7, dtype=np.int32),
        "images": (b"rgb", b"depth"),
        "image_grid_thw": ((1, 4, 4), (1, 4, 4)),
        "rollouts": (_rollout(), _rollout()),
    }
    return RolloutGroup(**(parts | changes))


def _logprobs(position: int, value: float) -> np.ndarray:
    logprobs = np.full(5, -1.0, dtype=np.float32)
    logprobs[position] = value
    return logprobs


def test_a_group_in_order_travels_unchanged() -> None:
    group = _group()
    assert (group.oldest_version, group.newest_version, group.num_tokens) == (3, 4, 10)
    travelled = pickle.loads(pickle.dumps(group))
    np.testing.assert_array_equal(travelled.rollouts[1].logprobs_T, group.rollouts[1].logprobs_T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids_T": np.arange(4)}, r"token_ids_T has shape \(4,\) and logprobs_T \(5,\)"),
        ({"token_ids_T": np.arange(0), "logprobs_T": np.zeros(0)}, "at least one token"),
        ({"logprobs_T": np.full((5, 1), -1.0)}, r"logprobs_T \(5, 1\)"),
        ({"logprobs_T": _logprobs(2, np.nan)}, r"logprobs_T\[2\] = nan"),
        ({"logprobs_T": _logprobs(4, -np.inf)}, r"logprobs_T\[4\] = -inf"),
        ({"logprobs_T": _logprobs(1, 0.25)}, r"logprobs_T\[1\] = 0.25"),
        ({"version_spans": ((3, 4),)}, "cover 4 of 5 tokens"),
        ({"version_spans": ((3, 4), (4, 2))}, "cover 6 of 5 tokens"),
        ({"version_spans": ()}, "cover 0 of 5 tokens"),
        ({"version_spans": ((3, 5), (4, 0))}, "a span at least 1 token"),
        ({"version_spans": ((-1, 5),)}, "a version is 0 or more"),
        ({"finish_reason": "abort"}, "finish_reason = 'abort' is not one of stop, length"),
    ],
)
def test_a_rollout_refuses_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        _rollout(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": ()}, "0 rollouts"),
        ({"prompt_token_ids_P": np.arange(0)}, "a prompt of 0 tokens"),
        ({"images": (b"rgb",)}, "1 images but 2 rows in image_grid_thw"),
        ({"image_grid_thw": ((1, 4, 4), (1, 0, 4))}, "at least one patch"),
    ],
)
def test_a_group_refuses_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        _group(**changes)
