"""The best and the worst rollout of a step are the ones kept, with the boxes of their last look on both pictures."""

from __future__ import annotations

import dataclasses
import io
import time

import numpy as np
import pytest
from PIL import Image
from planted_run import answer_text, toy_samples

from sif_ray.observe import completions, focus_picture
from sif_ray.observe.completions import CompletionLog, best_and_worst, draw, last_focus, read_completions
from sif_ray.records import Rollout, RolloutGroup, Sample, ScoredGroup


@pytest.fixture(scope="module")
def samples() -> dict[str, Sample]:
    return {sample.sample_id: sample for seed in range(3) for sample in toy_samples(seed)}


def scored_group(sample: Sample, texts: list[str], rewards: list[float], step: int = 0) -> ScoredGroup:
    tokens, logprobs = np.arange(4, dtype=np.int32), np.full(4, -1.0, np.float32)
    rollouts = tuple(Rollout(tokens, logprobs, ((step, 3), (step + 1, 1)), "stop", text) for text in texts)
    group = RolloutGroup(f"{sample.sample_id}@0", sample.sample_id, tokens, (sample.image,), ((1, 8, 8),), rollouts)
    rewards_G = np.array(rewards, np.float32)
    return ScoredGroup(group, rewards_G, {"format": rewards_G / 2, "box": rewards_G / 4})


def test_best_and_worst_are_over_all_groups(samples):
    first, second = list(samples.values())[:2]
    groups = [
        scored_group(first, ["a", "b", "c"], [1.0, 3.0, 0.5]),
        scored_group(second, ["d", "e", "f"], [3.0, 0.25, 0.25]),
    ]
    best, worst = best_and_worst(groups)
    assert (best.sample_id, best.text, best.total) == (first.sample_id, "b", 3.0)  # the first of two equal ones
    assert (worst.sample_id, worst.text, worst.total) == (second.sample_id, "e", 0.25)
    assert best.terms == {"format": 1.5, "box": 0.75} and best.versions == (0, 1)


def test_lines_and_pictures_are_written(samples, tmp_path):
    sample, other = list(samples.values())[:2]
    good = answer_text(sample, np.random.default_rng(0), noise=0.01, right=True)
    log = CompletionLog(tmp_path, samples, num_steps=2)
    for step in (1, 2):
        log.keep(step, [scored_group(sample, [good], [3.0]), scored_group(other, ["no trace <area>"], [0.0])])
    log.close()
    lines = read_completions(tmp_path)
    assert [(line["step"], line["role"]) for line in lines] == [(1, "best"), (1, "worst"), (2, "best"), (2, "worst")]
    best, worst = lines[:2]
    assert best["question"] == sample.question and best["reference"] == sample.answer and best["text"] == good
    assert best["terms"] == {"format": 1.5, "box": 0.75} and worst["text"] == "no trace <area>"
    for line in lines:
        picture = Image.open(tmp_path / line["picture"])
        assert (picture.format, picture.size) == ("JPEG", (2 * focus_picture.SIDE_PX + focus_picture.GAP_PX, 384))


def test_a_step_logged_again_replaces_the_first(samples, tmp_path):
    sample = next(iter(samples.values()))
    for text in ("before the crash", "after it"):
        log = CompletionLog(tmp_path, samples, num_steps=1)
        log.keep(1, [scored_group(sample, [text], [1.0])])
        log.close()
    assert [line["text"] for line in read_completions(tmp_path)] == ["after it", "after it"]


def test_the_focus_is_bright_with_a_yellow_frame_where_the_box_is():
    sample = dataclasses.replace(
        toy_samples(0)[0], image=grey(200, 100), depth_image=grey(200, 100), boxes=((0.5, 0.5, 1.0, 1.0),)
    )
    width, height, gap = focus_picture.SIDE_PX, focus_picture.SIDE_PX // 2, focus_picture.GAP_PX
    picture = np.asarray(Image.open(io.BytesIO(draw(sample, [(0.25, 0.0, 0.5, 0.5)]))).convert("RGB")).astype(int)
    assert picture.shape == (height, 2 * width + gap, 3)
    for left in (0, width + gap):  # photograph and depth map
        half = picture[:, left : left + width]
        assert half[height // 4, width * 3 // 8] == pytest.approx([128] * 3, abs=3)
        assert half[height * 3 // 4, width // 8] == pytest.approx([128 * focus_picture.SHADE] * 3, abs=3)
        red, green, blue = half[height // 4, width // 4 + 1]
        assert red > 200 and green > 170 and blue < 130
        assert half[height // 2 : height // 2 + 2, width * 3 // 4].max() > 180  # the evidence's white edge


def grey(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("<area>[]</area>", []),
        (
            '<area>[{"bbox_2d": [0, 0, 1, 1]}]</area> <area>[{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}]</area>',
            [(0.1, 0.2, 0.3, 0.4)],
        ),
        ('<area>[{"bbox_2d": [0.5, 0.2, 0.3, 0.4]}, {"bbox_2d": [0.1, 0.2, 7, 0.4]}]</area>', []),
    ],
)
def test_only_boxes_of_the_last_look_are_drawn(text, boxes):
    assert last_focus(text) == boxes


def test_the_disk_is_bounded_and_the_loop_does_not_wait(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "MAX_PICTURES", 20)
    monkeypatch.setattr(completions, "MAX_STEPS_BEHIND", 10_000)
    sample = next(iter(samples.values()))
    log = CompletionLog(tmp_path, samples, num_steps=95)
    long = "x" * 100_000
    group = scored_group(sample, [long] * 8, list(np.linspace(0, 3, 8)))
    started_s = time.perf_counter()
    for step in range(1, 96):
        log.keep(step, [group] * 16)
    took_s = time.perf_counter() - started_s
    log.close()
    files = list((tmp_path / "completions").iterdir())
    assert 18 <= len(files) <= 20 + 2
    lines = read_completions(tmp_path)
    assert len(lines) == 190 and sum(line["picture"] is not None for line in lines) == len(files)
    assert (tmp_path / completions.FILE).stat().st_size < 190 * 9000
    assert took_s / 95 < 0.01, f"{1000 * took_s / 95:.1f} ms a step"
