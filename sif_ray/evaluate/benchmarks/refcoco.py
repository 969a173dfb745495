"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of Visual-CoT: which region does this sentence describe?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from sif_ray.evaluate.benchmarks import grounding
from sif_ray.evaluate.benchmarks.files import read_rows
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import OVERALL, Measure, Ratios, grouped, mean_of

SPLITS = {
    "refcoco_unc": ("val", "testA", "testB"),
    "refcoco+_unc": ("val", "testA", "testB"),
    "refcocog_umd": ("val", "test"),
}

_ASK = "Please provide the bounding box coordinate of the region this sentence describes"


def _read(path: Path, answers: Path | None) -> Iterator[Item]:
    for row in read_rows(path):
        question = f"{_ASK}: {row.text('expression')}."
        yield grounding.box_item(row, category=path.stem.removeprefix("REC_"), question=question)


def _measure(replies: Sequence[Reply]) -> list[Measure]:
    points = grouped((reply.item.category, grounding.box_point(reply)) for reply in replies)
    return [Ratios("Acc@0.5", points, {OVERALL: mean_of(list(points))})]


REFCOCO = Benchmark(
    name="refcoco",
    summary="RefCOCO, RefCOCO+, RefCOCOg (8 splits): IoU > 0.5 of the last area",
    obtain=(
        "Take `REC_<set>_<split>.jsonl` from the data of Visual-CoT (huggingface.co/datasets/deepcs233/Visual-CoT; a "
        "few MB each, 57,457 sentences in all) and the images of COCO train2014 (13 GB, cocodataset.org)."
    ),
    conventions=grounding.CONVENTIONS,
    read=_read,
    measure=_measure,
    readable=grounding.has_box,
    files=tuple(f"REC_{name}_{split}.jsonl" for name, splits in SPLITS.items() for split in splits),
)
