"""A dataset as one HTML page: what it is, how its rows spread, what was refused and why, and rows to look at.

Text columns are read as a stream (`tally`); images only of the rows that are shown.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sif_ray.datagen.dataset import ACCEPTED, MANIFEST, PLAN, DatasetError
from sif_ray.datagen.scan import read_rows
from sif_ray.datagen.selection import stratified
from sif_ray.datagen.tally import LOG_AREA_EDGES, SHARE_BINS, IntArray, Tally, tally
from sif_ray.method.boxes import Box
from sif_ray.method.trace import parse
from sif_ray.observe import charts
from sif_ray.observe.examples import data_uri
from sif_ray.observe.page import add_open_argument, show, templates
from sif_ray.records import Sample, sample_from_row
from sif_ray.storage import Folder

PAGE = "inspection.html"
NUM_EXAMPLES = 24
EXAMPLE_SEED = 0
MAX_VALUES = 12  # of a column that are listed one by one
MAX_BARS = 24

_COLUMN_TITLES = {
    "split": "split",
    "dataset": "dataset",
    "question_type": "question type",
    "boxes": "boxes of evidence",
    "source_frame": "boxes came as",
    "depth_source": "depth",
}


# --- what is known besides the rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where the rows come from."""

    place: str
    config: dict[str, Any]  # as it was when the dataset was begun; an imported one has few keys
    config_hash: str  # "" = imported
    num_shards: int
    num_done: int
    manifest: dict[str, Any] | None  # None = not finished
    changed: datetime  # when the manifest was written, or the plan

    @property
    def state(self) -> str:
        return "finished" if self.manifest else f"not finished: {self.num_done:,} of {self.num_shards:,} shards done"


def read_origin(folder: Folder) -> Origin:
    """Raises `DatasetError` for a folder with neither manifest nor plan."""
    name = MANIFEST if folder.exists(MANIFEST) else PLAN
    if not folder.exists(name):
        raise DatasetError(f"{folder.url}: no dataset ({PLAN} is missing); make one with sif-ray generate")
    found = folder.read_json(name)
    num_done = len(folder.child(ACCEPTED).names())
    return Origin(
        place=folder.url,
        config=found["config"],
        config_hash=found.get("config_hash", ""),
        num_shards=num_done if name == MANIFEST else found["num_shards"],
        num_done=num_done,
        manifest=found if name == MANIFEST else None,
        changed=folder.filesystem.get_file_info(folder.path_of(name)).mtime,
    )


def facts(origin: Origin) -> Iterator[tuple[str, str]]:
    """What is said about the origin, the most important first: (name, value)."""
    config = origin.config
    yield "source", config["source"]
    yield "profile", config["profile"]
    if "teacher" in config:
        yield "teacher", f"{config['teacher']['kind']} {config['teacher']['model']}".rstrip()
        yield "depth model", config["depth_model"]
    yield "input", ", ".join(config["input"]) or "none"
    yield "configuration", origin.config_hash or "imported"
    yield "finished" if origin.manifest else "begun", f"{origin.changed:%Y-%m-%d %H:%M} UTC"
    yield "shards", f"{origin.num_done:,} of {origin.num_shards:,}"
    if origin.manifest:
        environment = origin.manifest["environment"]
        yield "seconds", f"{origin.manifest['seconds']:,.0f}"
        yield "commit", (environment["commit"] or "not known")[:12] + (" with changes" if environment["dirty"] else "")
        yield "Python", environment["python"]
        yield from environment["packages"].items()


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValueRow:
    """Rows with one value of a column."""

    value: str
    accepted: int
    refused: int
    accepted_width: float  # per cent of the widest row
    refused_width: float


@dataclass(frozen=True)
class ValueTable:
    title: str
    rows: list[ValueRow]
    num_others: int  # values that are not listed


def value_tables(counts: Tally) -> list[ValueTable]:
    """Accepted and refused rows by value: frequent ones first, numbers of boxes in their order."""
    tables = []
    for name, title in _COLUMN_TITLES.items():
        accepted, refused = counts.accepted.get(name, Counter()), counts.refused.get(name, Counter())
        found = (accepted + refused).most_common()
        widest = max((number for _, number in found), default=1) / 100
        if name == "boxes":
            found.sort(key=lambda entry: int(entry[0]))
        rows = [
            ValueRow(
                value or "not stated",
                accepted[value],
                refused[value],
                accepted[value] / widest,
                refused[value] / widest,
            )
            for value, _ in found
        ]
        tables.append(ValueTable(title, rows[:MAX_VALUES], len(rows[MAX_VALUES:])))
    return tables


def plots(counts: Tally) -> list[charts.Histogram]:
    """How boxes, depths, frames and traces of the accepted rows spread."""
    unit = np.linspace(0, 1, SHARE_BINS + 1)
    unit_ticks = [charts.Tick(100 * share, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)]
    areas = [charts.Tick(25 * k, label) for k, label in enumerate(("0.01 %", "0.1 %", "1 %", "10 %", "100 %"))]
    right, down = counts.centres.sum(axis=0), counts.centres.sum(axis=1)
    median_area = f"{100 * 10 ** _median(LOG_AREA_EDGES, counts.areas):.2g} %"
    return [
        charts.histogram("box area", "share of the image", counts.areas, areas, median_area),
        charts.histogram(
            "depth of the evidence",
            "mean in the box, 0 near and 1 far; outline: mean of the whole image",
            counts.evidence_depths,
            unit_ticks,
            f"{_median(unit, counts.evidence_depths):.2f}",
            other=counts.image_depths,
        ),
        charts.histogram("box centre", "from left to right", right, unit_ticks, f"{_median(unit, right):.2f}"),
        charts.histogram("box centre", "from top to bottom", down, unit_ticks, f"{_median(unit, down):.2f}"),
        _counter_plot("looks of a trace", "the whole image first, the evidence last", counts.looks),
        _counter_plot("length of a trace", "characters", counts.trace_chars),
        _counter_plot("size of the photographs", "longer side, px", counts.sides_px),
    ]


def _counter_plot(title: str, unit: str, counts: Counter[int]) -> charts.Histogram:
    """A histogram of numbers from 1 on: a bar for each, or for ranges of equal width where they are many."""
    high = max(counts)
    edges = np.arange(0.5, high + 1) if high < MAX_BARS else np.array(charts.nice_ticks(0, high, MAX_BARS))
    values, _ = np.histogram(list(counts), edges, weights=list(counts.values()))
    ticks = [
        charts.Tick(charts.percent(number, edges[0], edges[-1]), charts.short(number))
        for number in charts.nice_ticks(edges[0], edges[-1], 4)
        if edges[0] <= number <= edges[-1] and number == int(number)
    ]
    return charts.histogram(title, unit, values, ticks, charts.short(statistics.median(counts.elements())))


def _median(edges: npt.NDArray[Any], counts: Sequence[int] | IntArray) -> float:
    """The middle of the bin that holds the median."""
    place = int(np.searchsorted(np.cumsum(counts), np.sum(counts) / 2))
    return float(edges[place] + edges[place + 1]) / 2


def heat(centres: IntArray) -> list[tuple[int, int, float]]:
    """(column, row, strength in (0, 1]) of the cells in which a box has its centre."""
    strengths = np.sqrt(centres / max(centres.max(), 1))  # the eye would see only the fullest cells
    return [(int(column), int(row), round(float(strengths[row, column]), 3)) for row, column in np.argwhere(centres)]


# --- rows to look at -------------------------------------------------------------------------------------------------

WIDTH = 400  # of a picture in the units of its drawing
LABEL_HEIGHT = 22  # side of the square with a number


@dataclass(frozen=True)
class Mark:
    """A box on a picture, and where its label stands."""

    x: float
    y: float
    width: float
    height: float
    label: str
    label_x: float
    label_y: float
    label_width: float


@dataclass(frozen=True)
class Look:
    """One step of a trace in words."""

    depths: str
    text: str


@dataclass(frozen=True)
class Example:
    """A row with its two pictures, `WIDTH` wide and `height` high."""

    sample: Sample
    photo: str  # data URI
    depth: str  # data URI
    height: float
    way: list[Mark]  # frames between the whole image, which is number 1, and the evidence
    evidence: list[Mark]
    depths: list[Mark]  # the evidence again, labelled with its depth
    looks: list[Look]


def draw_examples(folder: Folder, counts: Tally) -> list[Example]:
    """`NUM_EXAMPLES` accepted rows, evenly over the datasets and in turns, always the same ones."""
    shards = {sample_id: shard for ids in counts.ids_by_dataset.values() for sample_id, shard in ids.items()}
    ids_by_shard: dict[str, list[str]] = {}
    for sample_id in stratified(counts.ids_by_dataset, NUM_EXAMPLES, EXAMPLE_SEED):
        ids_by_shard.setdefault(shards[sample_id], []).append(sample_id)
    rows = [row for shard, ids in ids_by_shard.items() for row in read_rows(folder.child(ACCEPTED), shard, ids)]
    by_dataset: dict[str, list[Sample]] = {}
    for sample in sorted(map(sample_from_row, rows), key=lambda sample: (sample.dataset, sample.sample_id)):
        by_dataset.setdefault(sample.dataset, []).append(sample)
    return [_example(sample) for turn in zip_longest(*by_dataset.values()) for sample in turn if sample is not None]


def _example(sample: Sample) -> Example:
    height = WIDTH * sample.height / sample.width
    steps = parse(sample.trace, sample.profile).steps
    last = len(steps)
    return Example(
        sample=sample,
        photo=data_uri(sample.image, "JPEG"),
        depth=data_uri(sample.depth_image),
        height=height,
        way=[
            make_mark(box.bbox_2d, height, str(number), number)
            for number, step in enumerate(steps[1:-1], start=2)
            for box in step.boxes
        ],
        evidence=[make_mark(box.bbox_2d, height, str(last), last) for box in steps[-1].boxes],
        depths=[make_mark(box.bbox_2d, height, f"{box.depth:.2f}", 0) for box in steps[-1].boxes],
        looks=[Look(", ".join(f"{box.depth:.2f}" for box in step.boxes), step.text) for step in steps],
    )


def make_mark(box: Box, height: float, label: str, number: int) -> Mark:
    """The label stands in a corner of the box, in turn, as the boxes of one trace often share corners."""
    x1, y1, x2, y2 = (value * side for value, side in zip(box, (WIDTH, height) * 2, strict=True))
    width = LABEL_HEIGHT * max(1.0, 0.5 * len(label))
    label_x = x1 if number % 4 in (0, 3) else x2 - width
    label_y = y1 if number % 4 in (0, 1) else y2 - LABEL_HEIGHT
    return Mark(
        x=round(x1, 1),
        y=round(y1, 1),
        width=round(x2 - x1, 1),
        height=round(y2 - y1, 1),
        label=label,
        label_x=round(min(max(label_x, 0.0), WIDTH - width), 1),
        label_y=round(min(max(label_y, 0.0), height - LABEL_HEIGHT), 1),
        label_width=width,
    )


@dataclass(frozen=True)
class Refusal:
    """A reason, how many rows have it, and one of them."""

    reason: str
    count: int
    row: dict[str, Any]


def refusals(counts: Tally) -> list[Refusal]:
    """The reasons, frequent ones first."""
    return [Refusal(reason, count, counts.refused_rows[reason]) for reason, count in counts.reasons.most_common()]


# --- the page --------------------------------------------------------------------------------------------------------


def render(origin: Origin, counts: Tally, examples: Sequence[Example]) -> str:
    """The page."""
    template = templates("sif_ray.datagen").get_template("inspection.html.jinja")
    return template.render(
        origin=origin,
        facts=list(facts(origin)),
        counts=counts,
        tables=value_tables(counts),
        plots=plots(counts) if counts.num_accepted else [],
        heat=heat(counts.centres),
        bins=SHARE_BINS,
        refusals=refusals(counts),
        examples=examples,
        picture_width=WIDTH,
        label_height=LABEL_HEIGHT,
    )


def summary(origin: Origin, counts: Tally) -> str:
    """The page in a few lines of text."""
    num_rows = counts.num_accepted + counts.num_refused
    found = {
        "rows": f"{counts.num_accepted:,} accepted, {counts.num_refused:,} of {num_rows:,} refused",
        "photographs": f"{len(counts.scene_ids):,}",
    }
    for table in value_tables(counts):
        values = [f"{row.value} {row.accepted:,}" for row in table.rows if row.accepted]
        found[table.title] = ", ".join(values) + (f" and {table.num_others} more" if table.num_others else "")
    found["refused for"] = ", ".join(f"{reason} {count:,}" for reason, count in counts.reasons.most_common())
    lines = [f"  {title:<17}  {value}" for title, value in found.items() if value]
    return "\n".join([f"{origin.place}: {origin.state}", *lines])


# --- sif-ray data inspect --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a dataset, finished or not, or its URL")
    parser.add_argument("--output", metavar="FILE.html", help=f"where the page goes (default: {PAGE} in FOLDER)")
    add_open_argument(parser)


def run(options: argparse.Namespace) -> None:
    """Raises `DatasetError` where FOLDER is no dataset."""
    folder = Folder.open(options.folder)
    origin, counts = read_origin(folder), tally(folder)
    page = render(origin, counts, draw_examples(folder, counts))
    if options.output:
        output = Path(options.output).absolute()
        folder, name = Folder.open(output.parent, "output"), output.name
    else:
        name = PAGE
    folder.write(name, page.encode())
    print(summary(origin, counts))
    print(f"  {'page':<17}  {folder.child(name).url}")
    if folder.is_local:
        show(Path(folder.path_of(name)), options.open)
