"""The page of a dataset says what is in its folder, finished or not, and shows hostile text as text."""

from __future__ import annotations

import base64
import io
import re
import statistics
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import needs_chromium, num_saturated_colours, screenshot
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_dataset import ATTACK, ROWS_PER_SHARD, SmallDataset, make_small_dataset

from sif_ray import cli
from sif_ray.datagen import inspection
from sif_ray.datagen.dataset import read_rejected, read_samples
from sif_ray.datagen.tally import Tally, tally
from sif_ray.method.depth_code import box_mean, decode
from sif_ray.records import Sample
from sif_ray.storage import Folder

SECTIONS = ["examples", "spread", "values", "refused", "origin"]


class Page(HTMLParser):
    """Tags must nest; attributes and words are kept."""

    VOID = ("meta", "br", "link")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def text(page: Page) -> str:
    return " ".join(" ".join(page.words).split())


@pytest.fixture(scope="module")
def file(small_dataset: SmallDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("inspection") / "sif.html"
    assert cli.main(["data", "inspect", small_dataset.place, "--output", str(file), "--open", "no"]) == 0
    return file


@pytest.fixture(scope="module")
def page(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def counts(small_dataset: SmallDataset) -> Tally:
    return tally(Folder.open(small_dataset.place))


@pytest.fixture(scope="module")
def samples(small_dataset: SmallDataset) -> list[Sample]:
    return read_samples(small_dataset.place)


# --- counts ----------------------------------------------------------------------------------------------------------


def test_rows_are_counted_by_value(counts: Tally, samples: list[Sample], small_dataset: SmallDataset) -> None:
    rejected = read_rejected(small_dataset.place)
    assert (counts.num_accepted, counts.num_refused) == (len(samples), len(rejected))
    for name in ("split", "dataset", "question_type", "depth_source", "source_frame"):
        assert counts.accepted[name] == Counter(getattr(sample, name) for sample in samples)
        assert counts.refused[name] == Counter(getattr(sample, name) for sample, _ in rejected)
    assert counts.accepted["boxes"] == Counter(str(len(sample.boxes)) for sample in samples)
    assert counts.scene_ids == {sample.scene_id for sample in samples}


def test_boxes_are_counted_where_they_are(counts: Tally, samples: list[Sample]) -> None:
    boxes = [box for sample in samples for box in sample.boxes]
    assert counts.num_boxes == counts.areas.sum() == counts.centres.sum() == len(boxes)
    large = sum((x2 - x1) * (y2 - y1) >= 0.01 for x1, y1, x2, y2 in boxes)  # an edge of the bins
    assert counts.areas[len(counts.areas) // 2 :].sum() == large
    half = len(counts.centres) // 2
    assert counts.centres[:, half:].sum() == sum((x1 + x2) / 2 >= 0.5 for x1, _, x2, _ in boxes)
    assert counts.centres[half:].sum() == sum((y1 + y2) / 2 >= 0.5 for _, y1, _, y2 in boxes)


def test_depths_are_those_of_the_maps(counts: Tally, samples: list[Sample]) -> None:
    """The counts come from the traces; here the means are taken from the depth images."""
    evidence, whole = [], []
    for sample in samples:
        depth_rel = decode(np.asarray(Image.open(io.BytesIO(sample.depth_image)).convert("RGB")))
        whole.append(depth_rel.mean())
        evidence += [box_mean(depth_rel, box) for box in sample.frames[-1]]
    for found, means in ((counts.evidence_depths, evidence), (counts.image_depths, whole)):
        assert found.sum() == len(means)
        cumulative = np.cumsum(found)
        for place, edge in enumerate(np.linspace(0, 1, len(found) + 1)[1:]):
            # a trace rounds: what lies at an edge may count on either side of it
            assert sum(mean < edge - 0.006 for mean in means) <= cumulative[place]
            assert cumulative[place] <= sum(mean < edge + 0.006 for mean in means)


def test_traces_and_photographs_are_measured(counts: Tally, samples: list[Sample]) -> None:
    assert counts.looks == Counter(len(sample.frames) for sample in samples)
    assert counts.trace_chars == Counter(len(sample.trace) for sample in samples)
    assert counts.sides_px == Counter(max(sample.width, sample.height) for sample in samples)
    chars = inspection.plots(counts)[-2]
    assert chars.last == f"{statistics.median(len(sample.trace) for sample in samples):g}"


def test_every_reason_has_a_row(counts: Tally, small_dataset: SmallDataset) -> None:
    assert {row["sample_id"]: reason for reason, row in counts.refused_rows.items()} == small_dataset.reasons
    assert counts.reasons == Counter(small_dataset.reasons.values())


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_needs_nothing_else(page: Page, file: Path) -> None:
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == SECTIONS
    links = [value for _, name, value in page.attributes if name in ("href", "src", "action", "srcset", "poster")]
    assert links and all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    assert not re.search(r"https?://|@import|url\(", file.read_text(encoding="utf-8"))


def test_the_page_says_what_is_in_the_dataset(page: Page, counts: Tally, small_dataset: SmallDataset) -> None:
    words = text(page)
    assert f"{counts.num_accepted} questions about {len(counts.scene_ids)} photographs" in words
    assert all(reason in words for reason in small_dataset.reasons.values())
    assert all(dataset in words for dataset in counts.accepted["dataset"])
    assert "jsonl" in words and "not finished" not in words
    assert small_dataset.place in words


def test_hostile_text_stays_text(page: Page) -> None:
    assert page.tags["script"] == page.tags["img"] == 0
    assert any(ATTACK in words for words in page.words)


def test_the_summary_is_short(small_dataset: SmallDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", small_dataset.place, "--output", str(tmp_path / "a.html"), "--open", "no"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 15 and max(map(len, lines)) < 250
    assert lines[0] == f"{small_dataset.place}: finished"
    assert lines[-1].endswith(str(tmp_path / "a.html"))


def test_an_unfinished_dataset_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_small_dataset(str(tmp_path / "data"), tmp_path, num_shards=2)
    assert cli.main(["data", "inspect", made.place, "--open", "no"]) == 0
    assert capsys.readouterr().out.startswith(f"{made.place}: not finished: 2 of 4 shards done\n")
    words = text(Page((tmp_path / "data" / inspection.PAGE).read_text(encoding="utf-8")))
    assert "not finished: 2 of 4 shards done" in words
    assert f"of {2 * ROWS_PER_SHARD} that were made" in words


def test_a_dataset_without_a_row_yet_is_shown(tmp_path: Path) -> None:
    made = make_small_dataset(str(tmp_path / "data"), tmp_path, num_shards=0)
    assert cli.main(["data", "inspect", made.place, "--open", "no"]) == 0
    words = text(Page((tmp_path / "data" / inspection.PAGE).read_text(encoding="utf-8")))
    assert "No row has been accepted yet" in words and "No row was refused" in words


def test_an_imported_dataset_is_shown(small_dataset: SmallDataset, tmp_path: Path, counts: Tally) -> None:
    exported, imported = str(tmp_path / "exported"), str(tmp_path / "imported")
    assert cli.main(["data", "export", small_dataset.place, "--output", exported]) == 0
    assert cli.main(["data", "import", f"{exported}/published.json", "--output", imported]) == 0
    assert cli.main(["data", "inspect", imported, "--open", "no"]) == 0
    page = Page((tmp_path / "imported" / inspection.PAGE).read_text(encoding="utf-8"))
    assert f"{counts.num_accepted} questions" in text(page) and "not finished" not in text(page)


def test_a_folder_that_is_no_dataset_is_a_wrong_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "inspect", str(tmp_path), "--open", "no"]) == 2
    assert "no dataset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- examples --------------------------------------------------------------------------------------------------------


def test_examples_are_even_over_the_datasets(small_dataset: SmallDataset, counts: Tally) -> None:
    examples = inspection.draw_examples(Folder.open(small_dataset.place), counts)
    assert len(examples) == inspection.NUM_EXAMPLES
    assert set(Counter(example.sample.dataset for example in examples).values()) == {8}
    for example in examples:
        sizes = {
            Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size
            for uri in (example.photo, example.depth)
        }
        assert len(sizes) == 1  # photograph and depth map lie over each other
        assert [look.text for look in example.looks] == re.findall("<text>(.*?)</text>", example.sample.trace)
        assert len(example.evidence) == len(example.depths) == len(example.sample.boxes)


@given(
    box=st.tuples(*[st.floats(0, 1)] * 4).filter(lambda box: box[0] < box[2] and box[1] < box[3]),
    height=st.floats(60, 2000),
    label=st.sampled_from(["2", "11", "0.57"]),
    number=st.integers(0, 9),
)
def test_labels_stay_inside_the_picture(box: tuple[float, ...], height: float, label: str, number: int) -> None:
    mark = inspection.make_mark(box, height, label, number)
    assert 0 <= mark.label_x <= inspection.WIDTH - mark.label_width
    assert 0 <= mark.label_y <= height - inspection.LABEL_HEIGHT + 0.05
    assert (mark.x, mark.y) == pytest.approx((box[0] * inspection.WIDTH, box[1] * height), abs=0.06)


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False)])
def test_a_browser_draws_it(file: Path, width: int, dark: bool) -> None:
    picture = screenshot(file, f"inspection-{width}{'-dark' if dark else ''}", width, 2400, dark)
    assert picture.width == width
    assert num_saturated_colours(picture) > 1000  # photographs and depth maps
    assert (statistics.mean(picture.getpixel((2, 2))) < 64) == dark
