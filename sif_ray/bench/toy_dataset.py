"""A dataset folder of toy scenes, as the stage `generate` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sif_ray.datagen.dataset import ACCEPTED, FORMAT, MANIFEST
from sif_ray.datagen.drafts import Draft, drafts_to_table
from sif_ray.datagen.shards import shard_name, table_bytes
from sif_ray.method import depth_code
from sif_ray.records import Sample
from sif_ray.toyworld.questions import draw_questions
from sif_ray.toyworld.render import png, render
from sif_ray.toyworld.scenes import make_scene

SPLIT = "grpo"


def write_dataset(folder: Path, count: int) -> Path:
    """`count` rows in the split `SPLIT`."""
    (folder / ACCEPTED).mkdir(parents=True)
    drafts = [Draft(sample) for sample in toy_samples(count)]
    (folder / ACCEPTED / shard_name(0)).write_bytes(table_bytes(drafts_to_table(drafts)))
    manifest = {"format": FORMAT, "counts": {"splits": {SPLIT: {"accepted": count}}}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def toy_samples(count: int) -> Iterator[Sample]:
    for seed in range(count):
        scene = make_scene(seed)
        rendering = render(scene)
        question = draw_questions(scene, 1)[0]
        height, width = rendering.z_m.shape
        yield Sample(
            sample_id=f"toy-{seed}",
            scene_id=f"toy-{seed}",
            dataset="toyworld",
            split=SPLIT,
            question=question.text,
            question_type=question.question_type,
            answer=question.answer,
            boxes=question.boxes(rendering),
            width=width,
            height=height,
            image=png(rendering.rgb),
            depth_image=png(depth_code.encode(depth_code.from_disparity(rendering.disparity))),
            depth_source="exact",
            source_frame="image",
        )
