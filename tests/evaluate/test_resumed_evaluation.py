"""`sif-ray evaluate` of an endpoint as a user runs it, killed half-way and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import needs_chromium, num_saturated_colours, screenshot
from faulty_http import served
from small_policy import SmallPolicy, written

from sif_ray.evaluate.question import Key
from sif_ray.observe.jsonl import read

pytestmark = pytest.mark.timeout(900)  # a busy machine may be slow, not wrong

ROOT = Path(__file__).resolve().parents[2]
SEED = 3
MAX_ITEMS = {"sat": 60, "pope": 30, "viscot_det": 24}
POLICIES = ("small", "other")
ARMS = {"greedy": 1, "sampled_T0.5": 2}


def start(url: str, output: Path, *others: str) -> subprocess.Popen[str]:
    benchmarks = [
        f"benchmarks.{name}.{key}={value}"
        for name, number in MAX_ITEMS.items()
        for key, value in (("name", name), ("annotations", "toy"), ("max_items", number))
    ]
    endpoints = [
        f"endpoints.{name}.{key}"
        for name in POLICIES
        for key in (f"model={name}", f"base_url={url}/v1", "max_concurrency=8")
    ]
    arms = ["temperatures=[0.5]", "draws=2", "bootstrap_samples=100", f"seed={SEED}", "depth_num_cpus=0.5"]
    return subprocess.Popen(
        [sys.executable, "jobs/evaluate.py", "data=''", f"output={output}", *benchmarks, *endpoints, *arms, *others],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return said


def answered(output: Path) -> dict[tuple[str, Key], str]:
    """Every answer in the files; none twice."""
    found: dict[tuple[str, Key], str] = {}
    for path in (output / "answers").glob("*/*/*.jsonl"):
        arm, draw = (path.stem[:-2], 1) if path.stem.endswith(".1") else (path.stem, 0)
        for line in read(path):
            key = path.parents[1].name, Key(path.parent.name, arm, draw, line["id"])
            assert key not in found, f"{key} is there twice"
            found[key] = line["text"]
    return found


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """(output, what the policy saw, answers at the kill, requests of the first run, what the second run said)."""
    output = tmp_path_factory.mktemp("evaluate") / "out"
    policy = SmallPolicy(delay_s=0.05)
    with served(policy.app()) as url:
        process = start(url, output)
        end_s = time.monotonic() + 480
        while not (output.exists() and len(answered(output)) > 60):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < end_s
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        before, requests = answered(output), -1
        while requests != len(policy.seen):  # its workers notice a little later
            requests = len(policy.seen)
            time.sleep(3)
        policy.delay_s = 0.0
        said = finished(start(url, output))
        yield output, policy.seen, before, requests, said


def test_every_answer_is_there_once_and_none_is_asked_twice(killed_and_resumed):
    output, seen, before, requests, said = killed_and_resumed
    found = answered(output)
    results = json.loads((output / "results.json").read_text())
    numbers = {name: entry["policies"]["small"]["greedy"][0]["n"] for name, entry in results["benchmarks"].items()}
    assert 60 < len(before) < len(found) == len(POLICIES) * sum(numbers.values()) * sum(ARMS.values())
    assert {name: numbers[name] for name in ("sat", "pope")} == {"sat": 60, "pope": 30}
    assert {key: found[key] for key in before} == before
    assert f"{len(before)} answers are there already" in said
    assert len(seen) - requests == len(found) - len(before), "the second run asks for what is missing, once"


def test_answers_are_those_to_their_questions(killed_and_resumed):
    output, seen, *_ = killed_and_resumed
    texts = {name: {written(name, one.text, one.seed) for one in seen if one.model == name} for name in POLICIES}
    for (policy, key), text in answered(output).items():
        assert text in texts[policy]
        assert text.endswith(f"<answer>{'left' if key.seed(SEED) % 2 else 'right'}</answer>")
    assert {one.temperature for one in seen} == {0.0, 0.5}


def test_the_general_benchmarks_are_asked_plainly_and_the_others_with_depth(killed_and_resumed):
    _, seen, *_ = killed_and_resumed
    plain = [one for one in seen if one.system]
    thinking = [one for one in seen if not one.system]
    assert {one.text.split()[0] for one in plain} == {"Is"}
    assert {len(one.sizes) for one in plain} == {1}
    assert {one.sizes for one in thinking} == {((112, 112), (112, 112))}
    assert all("<think>" in one.text for one in thinking)


def test_a_third_run_asks_nothing_and_another_question_is_not_mixed_in(killed_and_resumed):
    output, *_ = killed_and_resumed
    policy = SmallPolicy()
    with served(policy.app()) as url:
        other = start(url, output, "max_tokens=77")
        said, _ = other.communicate(timeout=120)
    assert other.returncode == 2
    assert "answers with another" in said and "resume=false" in said
    assert policy.seen == []


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.images = 0

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "image"


@needs_chromium
def test_the_page_shows_scores_and_worst_items(killed_and_resumed):
    output, *_ = killed_and_resumed
    page = output / "evaluation.html"
    parser = _Words()
    parser.feed(page.read_text())
    results = json.loads((output / "results.json").read_text())
    for entry in results["benchmarks"].values():
        for policy in POLICIES:
            greedy = entry["policies"][policy]["greedy"][0]
            assert f"{greedy['strict']['score']:.3f}" in parser.words
            assert f"{greedy['published']['score']:.3f}" in parser.words
        paired = entry["paired"]["other"]["strict"][greedy["metric"]]["overall"]
        assert f"{paired['difference']:+.3f}" in parser.words
    assert parser.images == 6 * len(results["benchmarks"])
    for dark in (False, True):
        assert (
            num_saturated_colours(screenshot(page, f"evaluation-{'dark' if dark else 'light'}", 1240, 2400, dark)) > 20
        )
    screenshot(page, "evaluation-phone", 420, 1600)
