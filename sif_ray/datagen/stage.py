"""The stage `generate`: configuration in, dataset folder out.

no plan.json: selected annotations ─► index/, plan.json ─┐
plan.json of the same content ───────────────────────────┴─► shards that data/ lacks ─► pipeline ─► all shards there
                                                                   ─► released layout ─► manifest.json
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, GenerateConfig
from sif_ray.datagen import index, pipeline, shards
from sif_ray.datagen.annotations import Source
from sif_ray.datagen.chat_teacher import check_teacher
from sif_ray.datagen.content import content_of, hash_of, refuse_other_content
from sif_ray.datagen.counts import Counts
from sif_ray.datagen.dataset import (
    ACCEPTED,
    FORMAT,
    INDEX,
    MANIFEST,
    PLAN,
    DatasetError,
    read_manifest,
)
from sif_ray.datagen.index import Plan
from sif_ray.datagen.published import publish
from sif_ray.datagen.selection import select
from sif_ray.datagen.shards import Summary
from sif_ray.datagen.source import make_source
from sif_ray.depth.checkpoint import tell_licence
from sif_ray.judge.factory import check_judge
from sif_ray.observe.progress import Progress
from sif_ray.observe.run_folder import environment, kept_to_itself
from sif_ray.runtime import ray_session
from sif_ray.storage import Folder

log = logging.getLogger(__name__)

READERS = 8  # shards of earlier runs that are read at once


def run(config: GenerateConfig) -> None:
    """Generate the dataset of `config` into `config.output`, or what is missing of it.

    Raises `ConfigError` for a request that cannot work, also when the folder holds something else or rows of another
    configuration, before any row is made; and `RuntimeError` if shards were lost or all rows refused.
    """
    started_s = time.time()
    folder = Folder.open(config.output, "output")
    content = content_of(config)
    if is_finished(folder, content):
        counts = read_manifest(folder)["counts"]
        log.info("generate: %s is finished with this configuration, %s", folder.url, _told(counts))
        return
    folder.check_writable("output")
    tell_licence(config.depth_model)
    with _sole_run(folder):
        folder.remove_parts()
        _check_models(config)
        source = make_source(config)
        plan = index.read_plan(folder, content)
        if plan is None:
            plan = index.write_plan(folder, select(source, config), config, content)
        work = Work(plan, committed(folder))
        _do(work, folder, source, config)
        finish(folder, config, content, work, started_s)
    counts = work.counts.total()
    log.info("generate: %s in %.0f s -> %s", _told(counts), time.time() - started_s, folder.url)
    for reason, count in counts["reasons"].items():
        log.warning("generate: %d rows refused: %s", count, reason)


def is_finished(folder: Folder, content: Mapping[str, Any]) -> bool:
    """Whether `folder` holds the finished dataset of `content`; False if it can be written.

    Raises `DatasetError` if it holds something else.
    """
    if folder.exists(MANIFEST):
        refuse_other_content(folder, read_manifest(folder), content)
        return True
    if not folder.exists(PLAN) and set(folder.names()) - {INDEX}:
        raise DatasetError(f"output = {folder.url!r} exists and is no dataset; choose another output")
    return False


def committed(folder: Folder) -> set[str]:
    """The names of the shards that are done."""
    return set(folder.child(ACCEPTED).names())


class Work:
    """The shards of a plan: which were done before, which are to do, and what is in them."""

    def __init__(self, plan: Plan, names: set[str]) -> None:
        self.plan = plan
        self.done = [shard for shard in range(plan.num_shards) if shards.shard_name(shard) in names]
        self.todo = [shard for shard in range(plan.num_shards) if shards.shard_name(shard) not in names]
        self.counts = Counts()
        self.files: dict[str, dict[str, Any]] = {}

    def add(self, summary: Summary) -> None:
        self.counts.add(summary["rows"])
        self.files |= {file["name"]: {"rows": file["rows"], "sha256": file["sha256"]} for file in summary["files"]}


def finish(folder: Folder, config: GenerateConfig, content: dict[str, Any], work: Work, started_s: float) -> None:
    """Make a folder of which every shard is done a dataset: the manifest is written last."""
    counts, plan = work.counts.total(), work.plan
    lost = sorted(set(map(shards.shard_name, range(plan.num_shards))) - committed(folder))
    found = counts["accepted"] + counts["rejected"]
    if lost or found != plan.num_rows:
        raise RuntimeError(
            f"{found} of {plan.num_rows} rows were made, and {folder.url} lacks {len(lost)} shards {lost[:3]}; "
            "every node must see the same folder: set output to shared storage"
        )
    if counts["accepted"] == 0:
        raise RuntimeError(f"all {found} rows were refused: {counts['reasons']}; see rejected/ in {folder.url}")
    publish(folder, config)
    manifest = {
        "format": FORMAT,
        "config": asdict(config),
        "config_hash": hash_of(content),
        "content": content,
        "counts": counts,
        "shards": dict(sorted(work.files.items())),
        "seconds": round(time.time() - started_s, 1),  # of the run that finished it
        "environment": environment(),
    }
    folder.write_json(MANIFEST, manifest)


def _do(work: Work, folder: Folder, source: Source, config: GenerateConfig) -> None:
    """Read the shards that are done, make those that are to do, and add all to `work`."""
    with Progress("generate", work.plan.num_rows, "rows", done=work.plan.rows_in(work.done)) as progress:
        for summary in _read_done(folder, work.done):
            work.add(summary)
        if not work.todo:
            return
        with ray_session(config.ray):
            _check_pools(config)
            with _goes_on(work), closing(pipeline.make_shards(source, work.todo, config, folder)) as made:
                for summary in made:
                    work.add(summary)
                    progress.advance(len(summary["rows"]), refused=work.counts.rejected)


def _read_done(folder: Folder, done: list[int]) -> Iterator[Summary]:
    with ThreadPoolExecutor(READERS) as pool:
        yield from pool.map(partial(shards.summarise, folder), done)


@contextlib.contextmanager
def _goes_on(work: Work) -> Iterator[None]:
    """Say what a run has that was interrupted or failed, and how it goes on."""
    try:
        yield
    except (Exception, KeyboardInterrupt):
        num_rows = work.counts.accepted + work.counts.rejected
        log.warning("generate: stopped with %d of %d rows; the same command goes on", num_rows, work.plan.num_rows)
        raise


def _sole_run(folder: Folder) -> AbstractContextManager[None]:
    return kept_to_itself(Path(folder.path)) if folder.is_local else nullcontext()


def _check_models(config: GenerateConfig) -> None:
    """Ask the models that are called over a network, before there is anything to lose."""
    if config.teacher.kind == "llm":
        check_teacher(config.teacher)
    if config.teacher.kind != "template":
        check_judge(config.judge)


def _check_pools(config: GenerateConfig) -> None:
    """Pools that hold every CPU starve the tasks that feed them, and the pipeline would stand still."""
    import ray

    available = ray.cluster_resources().get("CPU", 0)
    needed = 1 + (0 if config.depth_num_gpus else config.depth_actors_min * config.depth_num_cpus)
    keys = "depth_actors_min * depth_num_cpus"
    if config.teacher.kind != "template":
        needed += config.teacher.actors_min * pipeline.teacher_resources(config.teacher).get("num_cpus", 0)
        keys += ", teacher.actors_min"
    if config.ray.local and available < needed:
        raise ConfigError(
            f"ray.num_cpus ({available:g}) is below {needed:g}, 1 for the tasks and the rest for the pools ({keys}); "
            "raise it or lower those"
        )


def _told(counts: Mapping[str, Any]) -> str:
    return f"{counts['accepted']} rows of {counts['scenes']} photographs, {counts['rejected']} refused"
