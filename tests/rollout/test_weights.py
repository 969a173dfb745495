"""A weight update is refused for any damage, by the name of the tensor that is damaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sif_ray.rollout.errors import WeightSyncError
from sif_ray.rollout.weights import (
    ByteArray,
    WeightUpdate,
    check_coverage,
    make_update,
    read_tensors,
    specs_from_rows,
    specs_to_rows,
)

TENSORS = {
    "visual.patch.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layers.0.norm.weight": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "layers.0.scale": torch.tensor(7.0, dtype=torch.float16),
    "lm_head.weight": torch.linspace(-1, 1, 35).reshape(7, 5).t(),  # not contiguous
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def _update(version: int = 5) -> WeightUpdate:
    named = list(TENSORS.items())
    return make_update(version, [named[:2], named[2:]])


def test_tensors_come_back_bit_for_bit() -> None:
    update = _update()
    check_coverage(update.tensors, SHAPES)
    read = dict(read_tensors(update.tensors, update.buckets))
    assert list(read) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert update.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_specs_survive_a_channel_of_plain_lists() -> None:
    update = _update()
    assert tuple(specs_from_rows(specs_to_rows(update.tensors))) == update.tensors


def test_one_buffer_serves_all_buckets_that_are_put_away_and_no_others() -> None:
    named, stored, places = list(TENSORS.items()), [], set()

    def put(bucket: ByteArray) -> int:
        places.add(bucket.ctypes.data)
        stored.append(bucket.copy())
        return len(stored) - 1

    update = make_update(1, [named[1:], named[:1]], put=put)
    kept = make_update(1, [named[1:], named[:1]])
    assert update.tensors == kept.tensors
    for buckets in (stored, kept.buckets):
        read = dict(read_tensors(update.tensors, buckets))
        assert all(torch.equal(read[name], tensor) for name, tensor in named)
    assert len(places) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_is_found(data: st.DataObject) -> None:
    update = _update()
    spec = data.draw(st.sampled_from(update.tensors))
    position = spec.offset_bytes + data.draw(st.integers(0, spec.num_bytes - 1))
    update.buckets[spec.bucket][position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(WeightSyncError, match=f"{spec.name}: checksum"):
        list(read_tensors(update.tensors, update.buckets))


def test_a_truncated_bucket_is_found() -> None:
    update = _update()
    last = max((spec for spec in update.tensors if spec.bucket == 1), key=lambda spec: spec.offset_bytes)
    short = update.buckets[1][: last.offset_bytes + last.num_bytes - 1]
    with pytest.raises(WeightSyncError, match=last.name):
        list(read_tensors(update.tensors, (update.buckets[0], short)))


def test_a_lost_bucket_is_found() -> None:
    update = _update()
    with pytest.raises(WeightSyncError, match="bucket 1 of 1 is missing"):
        list(read_tensors(update.tensors, update.buckets[:1]))


def test_a_skipped_tensor_is_found() -> None:
    specs = [spec for spec in _update().tensors if spec.name != "layers.0.scale"]
    with pytest.raises(WeightSyncError, match=r"layers\.0\.scale: missing"):
        check_coverage(specs, SHAPES)


def test_a_strange_tensor_is_found() -> None:
    specs = [*_update().tensors, replace(_update().tensors[0], name="adapter.weight")]
    with pytest.raises(WeightSyncError, match=r"adapter\.weight: the policy has no such tensor"):
        check_coverage(specs, SHAPES)


def test_a_tensor_sent_twice_is_found() -> None:
    specs = [*_update().tensors, _update().tensors[0]]
    with pytest.raises(WeightSyncError, match=r"visual\.patch\.weight: appears twice"):
        check_coverage(specs, SHAPES)


def test_a_transposed_tensor_is_found() -> None:
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: shape \(5, 7\) in the update, \(7, 5\) in the policy"):
        check_coverage(_update().tensors, {**SHAPES, "lm_head.weight": (7, 5)})


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("layers.0.scale", {"dtype": "float32"}),
        ("layers.0.scale", {"dtype": "bfloat16"}),  # as many bytes
        ("lm_head.weight", {"shape": (7, 5)}),
        ("layers.0.norm.weight", {"name": "layers.1.norm.weight"}),
    ],
)
def test_a_spec_that_lies_about_the_bytes_is_found(name: str, lie: dict[str, Any]) -> None:
    update = _update()
    specs = [replace(spec, **lie) if spec.name == name else spec for spec in update.tensors]
    with pytest.raises(WeightSyncError, match=f"{lie.get('name', name)}: checksum"):
        list(read_tensors(specs, update.buckets))


def test_two_tensors_that_changed_their_names_are_found() -> None:
    twins = {name: torch.randn(4, 3) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    update = make_update(5, [list(twins.items())])
    specs = [replace(spec, name=other.name) for spec, other in zip(update.tensors, update.tensors[::-1], strict=True)]
    check_coverage(specs, dict.fromkeys(twins, (4, 3)))
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: checksum"):
        list(read_tensors(specs, update.buckets))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_only_the_types_of_a_policy_are_packed(dtype: torch.dtype) -> None:
    with pytest.raises(WeightSyncError, match="counter: dtype"):
        make_update(1, [[("counter", torch.zeros(2, dtype=dtype))]])


def test_a_parameter_that_was_not_gathered_is_refused() -> None:
    with pytest.raises(WeightSyncError, match=r"lm_head\.weight: has no elements"):
        make_update(1, [[("lm_head.weight", torch.empty(0))]])


def test_the_checksum_tells_updates_apart_and_ignores_their_packing() -> None:
    named = list(TENSORS.items())
    one_bucket = make_update(5, [named[::-1]])
    assert one_bucket.checksum == _update().checksum
    changed = make_update(5, [[(name, tensor * 2) for name, tensor in named]])
    assert changed.checksum != one_bucket.checksum
