"""A small run folder with made-up numbers in the formats of a real one, on real toy scenes and real traces."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sif_ray import config as configuration
from sif_ray.evaluate.results import summarise
from sif_ray.judge.scoring import score_terms, weighted_total
from sif_ray.method import depth_code
from sif_ray.method.boxes import Box
from sif_ray.method.expansion import forward_frames
from sif_ray.method.rewards import box_iou_reward, box_reward, depth_reward, format_reward
from sif_ray.method.trace import AreaBox, Step, Trace, find_answer, parse
from sif_ray.observe.completions import CompletionLog
from sif_ray.observe.metrics import MetricsLog
from sif_ray.observe.run_folder import RunFolder
from sif_ray.observe.timeline import Timeline
from sif_ray.records import SAMPLE_SCHEMA, Rollout, RolloutGroup, Sample, ScoredGroup, sample_to_row
from sif_ray.toyworld.questions import CHANCE, QUESTION_TYPES, draw_questions
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import SIZE_PX, make_scene

START_S = 1_760_000_000.0
ARMS = {"greedy": 1.0, "greedy_blind": 0.3, "greedy_swapped_depth": 0.8, "sampled_T1.0": 0.9, "sampled_T0.5": 0.97}
STEPS = 120
WORDS = ("Look at the whole image.", "Not here.", "Look closer.", "They are in this part.", "Here is the red ball.")


def plant_run(path: Path, num_scenes: int = 60) -> Path:
    """Write every file that the summary and the report read. Deterministic."""
    rng = np.random.default_rng(0)
    config = configuration.load("quickstart", None, ["generate.splits={heldout: 60}", f"run_dir={path}"])
    folder = RunFolder(path, config)
    samples = [sample for seed in range(num_scenes) for sample in toy_samples(seed)]
    _write_dataset(path / "data", samples)
    seconds = {"generate": 41.0, "warmup": 402.0, "grpo": 381.0, "evaluate": 118.0, "serve": 24.0}
    folder.write_json("stages.json", {name: {"seconds": value} for name, value in seconds.items()})
    _write_warmup(path / "warmup", rng)
    _write_grpo(path / "grpo", rng)
    _write_completions(path / "grpo", samples, rng)
    _write_evaluation(path / "evaluate", samples, rng)
    _write_response(path / "serve", samples[0], rng)
    return path


def plant_grpo_run(path: Path) -> Path:
    """A run of GRPO alone that has not finished, on rendered scenes."""
    rng = np.random.default_rng(0)
    samples = toy_samples(0)
    data, run = path / "data", path / "run"
    _write_dataset(data, samples)
    (data / "manifest.json").write_text(json.dumps({"config": {"source": "toyworld"}}))
    RunFolder(run, configuration.load("grpo", None, [f"data={data}", f"output={run}", "rewards.depth=0.5"]))
    _write_grpo(run, rng)
    _write_completions(run, samples, rng)
    return run


def toy_samples(seed: int) -> list[Sample]:
    """Two questions about one rendered scene."""
    scene = make_scene(seed)
    picture = render(scene)
    disparity = picture.disparity
    depth_image = png(depth_code.encode(depth_code.from_disparity(disparity)))
    return [
        Sample(
            sample_id=f"toy-{seed}-{question.question_type}",
            scene_id=f"toy-{seed}",
            dataset="toyworld",
            split="heldout",
            question=question.text,
            question_type=question.question_type,
            answer=question.answer,
            boxes=question.boxes(picture),
            width=SIZE_PX,
            height=SIZE_PX,
            image=png(picture.rgb),
            depth_image=depth_image,
            depth_source="exact",
            source_frame="image",
        )
        for question in draw_questions(scene, 2)
    ]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def answer_text(sample: Sample, rng: np.random.Generator, noise: float, right: bool) -> str:
    """A trace whose boxes miss by about `noise` of the image."""
    depth_rel = depth_of(sample)
    steps = []
    for index, frame in enumerate(forward_frames(sample.boxes, sample.width, sample.height, rng, "corrected")):
        boxes = [_jitter(box, rng, noise if index else 0.0) for box in frame]
        areas = tuple(AreaBox(box, round(depth_code.box_mean(depth_rel, box), 3)) for box in boxes)
        steps.append(Step(areas, WORDS[min(index, len(WORDS) - 1)]))
    return Trace(tuple(steps), sample.answer if right else "magenta").render()


def depth_of(sample: Sample) -> np.ndarray:
    return depth_code.decode(np.asarray(Image.open(io.BytesIO(sample.depth_image))))


def _jitter(box: Box, rng: np.random.Generator, noise: float) -> Box:
    x1, y1, x2, y2 = np.clip(np.asarray(box) + rng.normal(0, noise, 4), 0, 1).round(3)
    return (float(min(x1, x2 - 0.05)), float(min(y1, y2 - 0.05)), float(x2), float(y2)) if min(x2, y2) > 0.1 else box


def _write_dataset(folder: Path, samples: list[Sample]) -> None:
    for name in ("data", "rejected"):
        (folder / name).mkdir(parents=True)
    table = pa.Table.from_pylist([sample_to_row(sample) for sample in samples], schema=SAMPLE_SCHEMA)
    pq.write_table(table, folder / "data" / "part-00000.parquet")
    pq.write_table(table, folder / "rejected" / "part-00000.parquet")


def _write_warmup(folder: Path, rng: np.random.Generator) -> None:
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, 401):
            log.log(step, {"loss": 5.2 * math.exp(-step / 60) + 0.42 + 0.05 * float(rng.normal())})


def _write_grpo(folder: Path, rng: np.random.Generator) -> None:
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, STEPS + 1):
            done = 1 - math.exp(-step / 45)
            terms = {"format": 0.9 + 0.09 * done, "answer": 0.55 + 0.16 * done, "box": 0.55 + 0.2 * done}
            terms["depth"] = 0.35 + 0.3 * done
            terms = {f"reward/{name}": value + 0.03 * float(rng.normal()) for name, value in terms.items()}
            values = terms | {
                "reward/total": sum(terms.values()),
                "answer_score": 0.5 + 0.15 * done,
                "iou_last": 0.4 + 0.1 * done,
                "loss": 0.01 * float(rng.normal()),
                "kl": 0.08 * done,
                "entropy": 0.9 - 0.3 * done,
                "ratio_mean": 1.0,
                "clip_share": 0.02 + 0.01 * float(rng.random()),
                "is_weight_mean": 0.99,
                "grad_norm": 0.7,
                "staleness_max": float(rng.choice([0, 1, 1, 1, 2])),
                "staleness_mean": 0.8,
                "staleness/0": 0.3,
                "staleness/1": 0.6,
                "staleness/2": 0.1,
                "trained_tokens": 1800.0,
                "sync_s": 0.12 + 0.02 * float(rng.random()),
                "learner_idle_share": 0.15 + 0.05 * float(rng.random()),
                "engine_idle_share": 0.3 + 0.1 * float(rng.random()),
                "sync_bytes": 8.1e6,
                "no_spread_share": 0.25 - 0.1 * done + 0.05 * float(rng.random()),
                "completions_per_s": 41 + float(rng.normal()),
                "generated_tokens_per_s": 2600 + 40 * float(rng.normal()),
                "completion_tokens_mean": 58 - 4 * done,
                "truncated_share": 0.01,
            }
            if step % 10 == 0:
                values["parity_mean_abs"] = 4e-6 * (1 + abs(float(rng.normal())))
            log.log(step, values)
    timeline = Timeline(folder / "timeline.jsonl")
    now_s = START_S
    for step in range(STEPS):
        train_s, sync_s = float(rng.uniform(1.7, 2.1)), 0.12
        for group in range(8):
            start_s = now_s + 0.25 * group
            timeline.span("engine 0", "generate", start_s, start_s + 0.9 + float(rng.uniform(0, 0.2)), step=step)
            timeline.span("reward 0", "score", start_s + 1.1, start_s + 1.16, step=step)
        timeline.span("learner 0", "train", now_s + 0.6, now_s + 0.6 + train_s, step=step)
        timeline.span("sync", "sync", now_s + 0.6 + train_s, now_s + 0.6 + train_s + sync_s, step=step)
        timeline.span("learner 0", "wait", now_s + 0.72 + train_s, now_s + 1.2 + train_s, step=step)
        now_s += 0.6 + train_s + sync_s
    timeline.close()


def _write_completions(folder: Path, samples: list[Sample], rng: np.random.Generator) -> None:
    """Through the real log: one group of two rollouts in each of three steps."""
    log = CompletionLog(folder, {sample.sample_id: sample for sample in samples}, num_steps=STEPS)
    tokens, logprobs = np.arange(4, dtype=np.int32), np.zeros(4, np.float32)
    for step, noise in ((1, 0.15), (STEPS // 2, 0.06), (STEPS, 0.01)):
        sample = samples[step % len(samples)]
        texts = [answer_text(sample, rng, noise, right=True), answer_text(sample, rng, 0.25, right=False)]
        texts[1] = texts[1] if step > 1 else "<think>I see a room <area>[{"
        group = RolloutGroup(
            f"{sample.sample_id}@0",
            sample.sample_id,
            tokens,
            (sample.image, sample.depth_image),
            ((1, 8, 8), (1, 8, 8)),
            tuple(Rollout(tokens, logprobs, ((step - 1, 4),), "stop", text) for text in texts),
        )
        terms = [
            score_terms(
                text,
                target_boxes=sample.boxes,
                target_answer=sample.answer,
                depth_rel=depth_of(sample),
                answer_score=float(find_answer(text) == sample.answer),
                previous=None,
                profile="corrected",
            )
            for text in texts
        ]
        rewards_G = np.array([weighted_total(of_text, configuration.RewardConfig()) for of_text in terms], np.float32)
        terms_G = {name: np.array([of_text[name] for of_text in terms], np.float32) for name in terms[0]}
        log.keep(step, [ScoredGroup(group, rewards_G, terms_G)])
    log.close()


def _write_evaluation(folder: Path, samples: list[Sample], rng: np.random.Generator) -> None:
    items = [
        item
        for checkpoint, noise, skill in (("warmup", 0.06, 0.66), ("grpo", 0.02, 0.86))
        for sample in samples
        for item in _items(checkpoint, sample, noise, skill, rng)
    ]
    results = summarise(items, ["warmup", "grpo"], CHANCE, dict.fromkeys(QUESTION_TYPES, 0.5), num_samples=200, seed=0)
    results |= {"num_scenes": 400, "seconds": 118.0}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def _items(
    checkpoint: str, sample: Sample, noise: float, skill: float, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Every arm of one sample. All but the greedy arm borrow its text and scale its scores."""
    skill = {"closer": 1.1, "side": 1.0, "count": 0.8, "colour": 0.6, "shape": 0.45}[sample.question_type] * skill
    text = answer_text(sample, rng, noise, right=bool(rng.random() < skill))
    box, depth = box_reward(text, sample.boxes), depth_reward(text, depth_of(sample))
    iou_last = box_iou_reward(text, sample.boxes)
    for arm, scale in ARMS.items():
        for draw in range(4 if arm.startswith("sampled") else 1):
            chance = CHANCE[sample.question_type]
            answer = (
                find_answer(text) == sample.answer
                if arm == "greedy"
                else rng.random() < chance + scale * (skill - chance)
            )
            terms = {"format": format_reward(text), "answer": float(answer), "box": scale * box, "depth": scale * depth}
            yield {
                "checkpoint": checkpoint,
                "arm": arm,
                "sample_id": sample.sample_id,
                "scene_id": sample.scene_id,
                "question_type": sample.question_type,
                "draw": draw,
                "text": text,
                **terms,
                "iou_last": scale * iou_last,
                "total": sum(terms.values()),
            }


def _write_response(folder: Path, sample: Sample, rng: np.random.Generator) -> None:
    text = answer_text(sample, rng, 0.02, True)
    trace = parse(text)
    steps = [
        {"boxes": [{"bbox_xyxy_norm": box.bbox_2d, "depth": box.depth} for box in step.boxes], "text": step.text}
        for step in trace.steps
    ]
    record = {
        "question": sample.question,
        "truth": sample.answer,
        "truth_boxes": sample.boxes,
        "image": base64.b64encode(sample.image).decode(),
        "response": {
            "answer": trace.answer,
            "valid": True,
            "reasons": [],
            "steps": steps,
            "depth_image": base64.b64encode(sample.depth_image).decode(),
            "text": text,
            "policy_version": 0,
            "seconds": {"depth": 0.08, "generate": 0.52},
        },
    }
    folder.mkdir(parents=True)
    (folder / "response.json").write_text(json.dumps(record))
