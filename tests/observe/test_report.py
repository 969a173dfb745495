"""The report is whole, needs nothing outside itself, and shows hostile text as text."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest
from browser import needs_chromium, num_saturated_colours, screenshot
from PIL import Image
from planted_run import plant_grpo_run

from sif_ray import config as configuration
from sif_ray.cli import main
from sif_ray.observe import examples
from sif_ray.observe.charts import histogram, line_plot, nice_ticks, running_mean
from sif_ray.observe.report import headline, kept_completions, render, token_ages, write_report
from sif_ray.observe.run_files import RunFiles, read_run
from sif_ray.observe.run_folder import RunFolder

SECTIONS = ["examples", "rewards", "completions", "types", "comparison", "busy", "health", "served", "goals", "how"]
VOID = {"meta", "br", "input", "link"}


class Page(HTMLParser):
    """Tags must nest; attributes and scripts are kept."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture
def run(planted) -> RunFiles:
    return read_run(planted)


@pytest.fixture(scope="module")
def page(planted) -> Page:
    return Page(write_report(planted).read_text(encoding="utf-8"))


def test_every_section_is_there(page):
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == SECTIONS


def test_nothing_outside_the_file_is_named(page, planted):
    links = [value for _, name, value in page.attributes if name in ("href", "src", "action", "srcset", "poster")]
    assert links and all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in links)
    source = (planted / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\((?!#)", source)


def test_the_content_policy_allows_exactly_the_script_of_the_page(page):
    import hashlib

    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value]
    assert f"script-src 'sha256-{digest}'" in policy


def test_examples_follow_their_rule(run):
    found = examples.examples(run)
    wrong = [example for example in found if not example.right]
    assert len(wrong) == examples.NUM_WRONG
    assert {example.question_type for example in found if example.right} == {
        "closer",
        "side",
        "count",
        "colour",
        "shape",
    }
    assert all(example.iou_last >= examples.GOOD_IOU for example in found if example.right)
    for example in found:
        assert example.looks[0].title == "whole image"
        picture = Image.open(io.BytesIO(base64.b64decode(example.photo.partition(",")[2])))
        assert (picture.format, picture.size) == ("PNG", (112, 112))
        for look in example.looks:  # the planted policy reads depths off the map
            assert all(abs(box.stated_depth - box.map_depth) < 1e-3 for box in look.rectangles)


def test_completions_of_the_first_a_middle_and_the_last_step_are_shown(run):
    kept = kept_completions(run)
    assert [(line["step"], line["role"]) for line in kept] == [
        (step, role) for step in (1, 60, 120) for role in ("best", "worst")
    ]
    assert all(line["answer"] == line["reference"] for line in kept if line["role"] == "best")
    assert kept[1]["answer"] == "no answer" and kept[1]["total"] == 0.0


def test_a_run_whose_pictures_are_gone_shows_none(run):
    run.completions[:] = [line | {"picture": f"{line['picture']}.gone"} for line in run.completions]
    assert kept_completions(run) == []


def test_ages_of_tokens_are_weighted_by_tokens():
    steps = [
        {"staleness/0": 1.0, "trained_tokens": 100.0, "staleness_max": 0.0},
        {"staleness/0": 0.5, "staleness/3": 0.5, "trained_tokens": 300.0},
    ]
    assert token_ages(steps, window=1) == [(0, 62.5), (1, 0.0), (3, 37.5)]
    assert token_ages([{"loss": 1.0}], window=1) == []


def test_large_photographs_are_shrunk():
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(buffer, "JPEG")
    uri = examples.data_uri(buffer.getvalue())
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (448, 224)


def test_hostile_text_of_the_policy_stays_text(run):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for item in run.items:
        item["text"] = re.sub(r"<text>.*?</text>", f"<text>{attack}</text>", item["text"])
    for line in run.completions:
        line |= {"question": attack, "reference": attack, "text": f"<answer>{attack}</answer>"}
    run.response["response"] |= {"answer": attack, "text": attack}
    run.response["question"] = attack
    run.environment["platform"] = attack
    page = Page(render(run))
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert not [tag for tag, _, _ in page.attributes if tag == "img"]
    assert any(attack in words for words in page.words)


def test_a_run_without_later_stages_says_so(run):
    bare = dataclasses.replace(
        run, stage_seconds={}, warmup=[], grpo=[], timeline=[], completions=[], results=None, items=[], response=None
    )
    page = Page(render(bare))
    words = " ".join(page.words)
    assert "This run has not been evaluated" in words and "GRPO has not run" in words and "not measured" in words


GRPO_SECTIONS = ["rewards", "completions", "busy", "health", "how"]


def test_a_grpo_run_alone_is_shown_while_it_is_at_work(tmp_path, capsys):
    run = plant_grpo_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "reward/total"')  # a line that is being written
    assert main(["report", str(run), "--open", "no"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("GRPO-SIF at step 120\n") and str(run / "report.html") in told
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("section", "id")] == GRPO_SECTIONS
    words = " ".join(page.words)
    assert "toy run" in words and "depth 0.5" in words and "step 60, best" in words and "not run" not in words
    assert not re.search("quickstart|warm-up, |goals", words, re.IGNORECASE)


def test_the_headline_of_a_grpo_run_has_the_means_of_its_ends(tmp_path):
    run = read_run(plant_grpo_run(tmp_path))
    totals = [record["reward/total"] for record in run.grpo]
    first, last = sum(totals[:20]) / 20, sum(totals[-20:]) / 20
    assert f"{first:.2f} in the first 20 steps, {last:.2f} in the last 20 steps" in headline(run)[1]
    evaluated = [{"step": 0.0, "eval/total": 2.0}, *run.grpo, {"step": 120.0, "eval/total": 2.5}]
    assert "2.00 at step 0, 2.50 at 120" in headline(dataclasses.replace(run, grpo=evaluated))[1]
    assert "finished after step 120" in headline(dataclasses.replace(run, grpo_finished=True))[0]
    assert "no step yet" in headline(dataclasses.replace(run, grpo=[]))[0]


def test_a_grpo_run_that_has_only_begun_is_shown(tmp_path):
    run = tmp_path / "run"
    RunFolder(run, configuration.load("grpo"))
    words = " ".join(Page(write_report(run).read_text(encoding="utf-8")).words)
    assert "no step yet" in words and "Nothing yet." in words and "toy" not in words


@pytest.mark.parametrize(
    ("interval", "verb"),
    [([0.1, 0.3], "raised the reward"), ([-0.1, 0.1], "did not clearly move"), ([-0.3, -0.1], "lowered the reward")],
)
def test_the_headline_claims_what_the_interval_allows(run, interval, verb):
    run.results["paired"]["sampled_T1.0"]["total"]["ci95"] = interval
    assert verb in headline(run)[0]


def test_missed_goals_are_shown_as_missed(run):
    run.results["num_scenes"] = 12
    source = render(run)
    assert source.count('<tr class="missed">') == 1 and "12 of 13" in source


def test_the_running_mean_is_centred():
    assert running_mean([0.0, 3.0, 6.0, 0.0], 1) == [1.5, 3.0, 3.0, 3.0]
    assert running_mean([1.0, 2.0], 0) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-3.2, 17.0), (1e-6, 9e-6), (5.0, 5.0), (0.0, 0.0), (2600, 2700)]
)
def test_ticks_enclose_the_values_and_are_few(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))


def test_a_plot_of_one_step_is_drawn():
    plot = line_plot("loss", "nats", [1], [0.5])
    assert plot.mean_path.startswith("M0.00") and "nan" not in plot.mean_path


def test_a_plot_stays_in_its_frame():
    plot = line_plot("loss", "nats", [1, 2, 3], [0.5, 3.0, -2.0])
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", plot.raw_path)]
    assert min(numbers) >= 0 and max(numbers) <= 100
    json.dumps(plot.hover, allow_nan=False)


def test_bars_are_shares_of_their_own_total():
    chart = histogram("box area", "share", [1, 0, 3], [], "0.5", other=[20, 20, 0])
    top = float(chart.y_ticks[-1].label.removesuffix(" %"))
    for path, shares in ((chart.path, [25, 0, 75]), (chart.other_path, [50, 50, 0])):
        heights = [100 - float(y) for y in re.findall(r"V([\d.]+)H", path)]
        assert [height * top / 100 for height in heights] == pytest.approx(shares, abs=0.01)
    assert histogram("box area", "share", [0, 0], [], "none").path.startswith("M0 100V100.00H50.00")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it(page, planted, width):
    picture = screenshot(planted / "report.html", f"report-{width}", width, 2000)
    assert picture.width == width
    assert num_saturated_colours(picture) > 50  # the pictures of the first example
