"""The Ray Data pipeline of a dataset. One row on it is a whole shard:

    numbers of shards ─► load ─────► depth ──────────► traces ────────────────────────────► commit
                         (tasks)     (actor pool)      (tasks; of a model: actor pool,      (tasks)
                                                        several shards under way in each)

Images travel encoded. Ray runs neighbouring steps as one where it can: without a GPU the depth actors load their
pictures too. Whatever a node was at work on when it is lost is made again from the index; what was committed stays.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from sif_ray.config import GenerateConfig, TeacherConfig
from sif_ray.datagen import shards
from sif_ray.datagen.annotations import Annotation, Source
from sif_ray.datagen.counts import FACTS_SCHEMA
from sif_ray.datagen.depth_stage import AddDepth
from sif_ray.datagen.drafts import DRAFT_SCHEMA, Draft, drafts_from_table, drafts_to_table
from sif_ray.datagen.index import read_shard
from sif_ray.datagen.pictures import PhotoError
from sif_ray.datagen.shards import Summary
from sif_ray.datagen.traces import TemplateTraces
from sif_ray.records import Sample
from sif_ray.storage import Folder

log = logging.getLogger(__name__)

READERS = 8  # pictures of a shard that are opened at once: those of an object store come late, not slowly
SPARE_SHARDS = 3  # an actor of a teacher has as many under way beyond what its requests fill: they cover for stragglers
NO_PROGRESS_S = 1800.0  # without a finished task after which Ray Data gives up, beyond a teacher's own patience

_SHARD_SCHEMA = pa.schema([("shard", pa.int64()), ("drafts", pa.list_(pa.struct(list(DRAFT_SCHEMA))))])
_FILE = pa.struct([("name", pa.string()), ("rows", pa.int64()), ("sha256", pa.string())])
_SUMMARY_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("files", pa.list_(_FILE)),
        ("rows", pa.list_(pa.struct(list(FACTS_SCHEMA)))),
        ("node_id", pa.string()),  # of the node that committed it
    ]
)


def make_shards(
    source: Source, todo: list[int], config: GenerateConfig, folder: Folder
) -> Generator[Summary, None, None]:
    """Make and commit the shards `todo` in the Ray session that is up; yields their summaries as they are done.

    A summary has a further key, "node_id". Raises the first error of any step, as `ray.exceptions.RayTaskError`.
    """
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # rows are counted where the run was started
    context.execution_no_progress_timeout_s = NO_PROGRESS_S + 2 * config.teacher.max_wait_s
    with ray.data.DataContext.current(context):
        pipeline = _pipeline(source, todo, config, folder)
    yield from pipeline.iter_rows()


def _pipeline(source: Source, todo: list[int], config: GenerateConfig, folder: Folder) -> Any:
    import ray.data

    one_shard: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": 1}
    loaded = ray.data.range(len(todo), override_num_blocks=len(todo)).map_batches(
        _load, fn_kwargs={"source": source, "todo": todo, "config": config, "folder": folder}, **one_shard
    )
    with_depth = loaded.map_batches(
        _Depth,
        fn_constructor_kwargs={"config": config},
        compute=ray.data.ActorPoolStrategy(min_size=config.depth_actors_min, max_size=config.depth_actors_max),
        **_resources(config.depth_num_cpus, config.depth_num_gpus),
        **one_shard,
    )
    if config.teacher.kind == "template":
        traced = with_depth.map_batches(_template_traces, fn_kwargs={"config": config}, **one_shard)
    else:
        traced = with_depth.map_batches(
            _ModelTraces,
            fn_constructor_kwargs={"config": config},
            compute=ray.data.ActorPoolStrategy(
                min_size=config.teacher.actors_min,
                max_size=config.teacher.actors_max,
                max_concurrent_calls_per_actor=shards_under_way(config),
            ),
            **teacher_resources(config.teacher),
            **one_shard,
        )
    return traced.map_batches(_commit, fn_kwargs={"folder": folder}, **one_shard)


def shards_under_way(config: GenerateConfig) -> int:
    """Shards that one actor of a teacher works on at a time: the rows of one that waits for a last reply leave room.

    Ray Data runs the calls of an asynchronous stage in one event loop, so that one limit holds for all of them.
    """
    return math.ceil(config.teacher.max_concurrency / config.teacher.actors_max / config.rows_per_shard) + SPARE_SHARDS


def teacher_resources(teacher: TeacherConfig) -> dict[str, Any]:
    """What one actor of a model teacher asks of Ray: a CPU to prepare requests, or what its engine needs."""
    return _resources(teacher.engine.num_cpus, teacher.engine.num_gpus) if teacher.kind == "vllm" else {"num_cpus": 1.0}


def _resources(num_cpus: float, num_gpus: float) -> dict[str, Any]:
    return {"num_gpus": num_gpus} if num_gpus > 0 else {"num_cpus": num_cpus}  # Ray Data advises against both


# --- the steps, on tables with one shard -----------------------------------------------------------------------------


def _load(table: pa.Table, source: Source, todo: list[int], config: GenerateConfig, folder: Folder) -> pa.Table:
    shard = todo[table["id"][0].as_py()]
    if shards.is_done(folder, shard):  # Ray makes a lost result again: `_commit` has it without the work between
        return pack(shard, [])
    with ThreadPoolExecutor(READERS) as pool:
        drafts = pool.map(lambda annotation: open_draft(source, annotation, config.profile), read_shard(folder, shard))
        return pack(shard, list(drafts))


class _Depth:
    def __init__(self, config: GenerateConfig) -> None:
        self._add_depth = AddDepth(config)

    def __call__(self, table: pa.Table) -> pa.Table:
        shard, drafts = unpack(table)
        return pack(shard, self._add_depth(drafts))


def _template_traces(table: pa.Table, config: GenerateConfig) -> pa.Table:
    shard, drafts = unpack(table)
    return pack(shard, TemplateTraces(config)(drafts))


class _ModelTraces:
    def __init__(self, config: GenerateConfig) -> None:
        from sif_ray.datagen.model_traces import ModelTraces

        self._traces = ModelTraces(config)
        gc.freeze()  # or every full collection looks through all that was imported, and holds up the replies

    async def __call__(self, table: pa.Table) -> pa.Table:
        shard, drafts = unpack(table)
        return pack(shard, await self._traces(drafts))


def _commit(table: pa.Table, folder: Folder) -> pa.Table:
    import ray

    shard, drafts = unpack(table)
    sample_ids = [annotation.sample_id for annotation in read_shard(folder, shard)]
    summary = shards.commit(folder, shard, drafts, sample_ids)
    node_id = ray.get_runtime_context().get_node_id()
    return pa.Table.from_pylist([{**summary, "node_id": node_id}], schema=_SUMMARY_SCHEMA)


def open_draft(source: Source, annotation: Annotation, profile: str) -> Draft:
    """The draft of an annotation with its picture; refused where the annotation or the picture cannot be used."""
    if annotation.error:
        return _draft(annotation, profile).refused(annotation.error)
    try:
        picture = source.open(annotation)
    except PhotoError as error:
        log.info("%s: %s", annotation.sample_id, error)
        return _draft(annotation, profile).refused(error.reason)
    return _draft(picture.annotation, profile, picture.image, picture.depth_image, picture.depth_source)


def _draft(
    annotation: Annotation, profile: str, image: bytes = b"", depth_image: bytes = b"", depth_source: str = ""
) -> Draft:
    boxes = tuple((box[0], box[1], box[2], box[3]) for box in annotation.boxes if len(box) == 4)
    sample = Sample(
        sample_id=annotation.sample_id,
        scene_id=annotation.image,
        dataset=annotation.dataset,
        split=annotation.split,
        question=annotation.question,
        question_type=annotation.question_type,
        answer=annotation.answer,
        boxes=boxes,
        width=annotation.width,
        height=annotation.height,
        image=image,
        depth_image=depth_image,
        depth_source=depth_source,
        source_frame=annotation.frame,
        profile=profile,
    )
    draft = Draft(sample, annotation.names)
    return draft if len(boxes) == len(annotation.boxes) else draft.refused("boxes_invalid")


def pack(shard: int, drafts: list[Draft]) -> pa.Table:
    rows = drafts_to_table(drafts).to_struct_array().combine_chunks()
    return pa.table([pa.array([shard]), pa.ListArray.from_arrays([0, len(drafts)], rows)], schema=_SHARD_SCHEMA)


def unpack(table: pa.Table) -> tuple[int, list[Draft]]:
    (shard,) = table["shard"].to_pylist()  # never two: a shard is one row of the pipeline
    rows = table["drafts"].combine_chunks().flatten()
    return shard, drafts_from_table(pa.Table.from_struct_array(rows))
