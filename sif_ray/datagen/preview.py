"""What a run of `generate` would do, without a model, Ray or a pass over large files: for `--dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen import stage
from sif_ray.datagen.annotations import Source
from sif_ray.datagen.content import content_of
from sif_ray.datagen.index import read_plan
from sif_ray.datagen.selection import select
from sif_ray.datagen.source import make_source
from sif_ray.datagen.source.picture_folder import PictureFolder
from sif_ray.datagen.source.rows import input_files
from sif_ray.method.prompts import teacher_system
from sif_ray.storage import Folder

MAX_COUNTED_BYTES = 32_000_000  # of annotation files that are read for the preview: a few seconds
MAX_COUNTED_SCENES = 10_000


def preview(config: GenerateConfig) -> str:
    """Source, rows, place and teacher of a run, in lines of text.

    What is not found is said to be missing: it may be where the run will be. Raises `ConfigError` where the run would
    be refused for its files or for what its output holds.
    """
    lines, missing, num_bytes = [f"source: {config.source}"], [], 0
    for place in config.input:
        try:
            for file in input_files([place]):
                size = file.filesystem.get_file_info(file.path).size
                num_bytes += size
                lines.append(f"  {file.path}  {size / 1e6:,.2f} MB")
        except ConfigError as error:
            missing.append(str(error))
    if config.images:
        lines.append(f"images: below {config.images}")
        try:
            PictureFolder.of(config.images).check()
        except ConfigError as error:
            missing.append(str(error))
    if missing:
        lines += [*(f"not found here: {fault}" for fault in missing), f"output: {config.output}"]
    else:
        source = make_source(config)
        lines += _rows(source, config, num_bytes)
        lines.append(f"output: {_progress(config)}")
        lines += _teacher(source, config)
    return "\n".join(["Data:", *(f"  {line}" for line in lines)])


def _rows(source: Source, config: GenerateConfig, num_bytes: int) -> Iterator[str]:
    if num_bytes > MAX_COUNTED_BYTES:
        yield f"rows: counting them needs a pass over {num_bytes / 1e6:,.0f} MB, with which a run begins"
        return
    if config.source == "toyworld" and (scenes := sum(config.scenes_per_split.values())) > MAX_COUNTED_SCENES:
        yield f"rows: at most {config.questions_per_scene} for each of {scenes:,} scenes"
        return
    counts: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for annotation in select(source, config):
        counts[annotation.dataset] += 1
        faults.update([annotation.error] if annotation.error else [])
    shards = -(-counts.total() // config.rows_per_shard)
    yield f"rows: {counts.total():,} in {shards:,} shards of {config.rows_per_shard}"
    yield from (f"  {dataset}  {count:,}" for dataset, count in counts.most_common())
    yield from (f"  to be refused, {reason}: {count:,}" for reason, count in faults.most_common())


def _progress(config: GenerateConfig) -> str:
    folder = Folder.open(config.output, "output")
    content = content_of(config)
    if stage.is_finished(folder, content):
        return f"{folder.url} holds this dataset, finished; a run would do nothing"
    plan = read_plan(folder, content)
    if plan is None:
        return f"{folder.url}; a run would start"
    return f"{folder.url}; a run would go on, {len(stage.committed(folder)):,} of {plan.num_shards:,} shards are done"


def _teacher(source: Source, config: GenerateConfig) -> Iterator[str]:
    teacher = config.teacher
    if teacher.kind == "template":
        yield "teacher: fixed sentences; no model is asked"
        return
    place = teacher.base_url if teacher.kind == "llm" else "engines of this run"
    yield f"teacher: {teacher.model} ({place})"
    example = next((found for found in source.annotations() if not found.error), None)
    if example is not None:
        yield f"  about {example.sample_id} it would be told:"
        told = teacher_system(example.question, example.answer, config.decimals)
        yield from (f"  | {line}" for line in told.splitlines())
        yield "  and shown, for every frame, its boxes with their depth and the photograph with them in green"
