"""The stage `warmup`: the SIF dataset's traces, on the assistant's tokens only.

index the rows ─► Ray Train: ranks (warmup_rank.py) ◄─ Ray Data: encoded rows (stream.py)
                     ▲   │
                     │   ├── a rank died: all ranks start again from the newest checkpoint, with as many as there are
                     │   └── SIGTERM, Ctrl-C: the step ends and is saved
                     └── the next run of the stage
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer

from sif_ray.checkpoints import (
    FINISHED,
    digest_folder,
    digest_values,
    finished_before,
    flat_settings,
    remove_leftovers,
)
from sif_ray.config import ConfigError, WarmupConfig, validate
from sif_ray.datagen.dataset import ACCEPTED, SUBSETS, as_folder, read_manifest
from sif_ray.learner.order import Shard, evaluation_windows, training_windows
from sif_ray.learner.plan import num_steps
from sif_ray.learner.rows import index_rows
from sif_ray.learner.stream import ENCODER_CPUS, READER_CPUS, RowStream
from sif_ray.learner.warmup_rank import METRICS, TRAIL, WarmupJob, train_rank
from sif_ray.observe.run_folder import RunFolder, kept_to_itself
from sif_ray.policy.adapter import starting_adapter
from sif_ray.policy.check import check_policy, check_training_room, read_config
from sif_ray.runtime import ray_session, saving_time_s

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of the ranks, after one died
GROWING = (METRICS, TRAIL)

MAY_CHANGE = (
    *("data", "policy", "output"),  # paths: what is in them counts
    *("resume", "checkpoint_every", "checkpoints_kept", "eval_every", "min_ranks", "ray"),
    *("learner.num_ranks", "learner.num_cpus_per_rank", "learner.num_gpus_per_rank", "learner.threads"),
    *("learner.micro_batch_tokens", "learner.gradient_checkpointing", "learner.lora.adapter"),
)
"""Keys and blocks of `WarmupConfig` that say how a run is carried out, not what comes out of it."""


def run(config: WarmupConfig) -> None:
    """Train `config.policy` on a split. Writes to `config.output`: `checkpoint/` (Hugging Face layout, LoRA merged; of
    the steps at which it was evaluated the one with the lowest loss, else the last step), `adapter/` (with LoRA, peft's
    layout), `metrics.jsonl`, `trained.jsonl` (`sif_ray.observe.trail`), `checkpoints/` (`sif_ray.checkpoints`) and,
    last, `finished.json`.

    A run that was interrupted in the same folder is continued from its newest checkpoint, one that finished is left as
    it is; `config.resume` = False starts over. Raises `ConfigError` for a request that cannot work, before anything is
    started, and the first error of a rank.
    """
    validate(config)
    job = make_job(config)
    checkpoints = job.checkpoints
    if config.resume:
        if finished_before(job.output, job.settings):
            return
        newest = checkpoints.newest()
        if newest is not None:
            checkpoints.read(newest)
            log.info("warm-up: continuing from step %d of %d", newest, job.num_steps)
    with kept_to_itself(job.output), ray_session(config.ray):
        remove_leftovers(job.output, checkpoints, config.resume, GROWING)
        job.stop_file.unlink(missing_ok=True)
        folder = RunFolder(job.output, config)
        if checkpoints.newest() != job.num_steps:
            _fit(job)
        state = checkpoints.read(job.num_steps)
        finished = {"version": job.num_steps, "best": state["best"], "skipped": state["skipped"]}
        folder.write_json(FINISHED, finished | {"settings": job.settings})
    log.info("warm-up: checkpoint in %s", job.output / "checkpoint")


def make_job(config: WarmupConfig) -> WarmupJob:
    """What the ranks have to do, with everything checked that can be checked before they start."""
    output = Path(config.output).resolve()  # absolute, like all paths: workers have another working directory
    manifest = read_manifest(config.data)
    _check_split(config, manifest["counts"]["splits"])
    policy = check_policy(config.policy)
    _refuse_quantised(policy, config.policy)
    _check_ranks(config)
    settings = flat_settings(config, MAY_CHANGE) | {
        "contents of policy": digest_folder(Path(policy)),
        "contents of data": digest_values(manifest),
    }
    lora = config.learner.lora
    if lora.adapter:
        lora = replace(lora, adapter=str(Path(lora.adapter).resolve()))
        starting_adapter(lora, policy)
        settings["contents of adapter"] = digest_folder(Path(lora.adapter))
        config = replace(config, learner=replace(config.learner, lora=lora))
    check_training_room(config.output, policy, config.learner, config.checkpoints_kept)
    trained, held_back = index_rows(config.data, config.split, config.eval_share)
    steps = num_steps(config, sum(shard.num_rows for shard in trained))
    policy = policy if Path(config.policy).is_dir() else config.policy  # of a hub or a store each node has its own copy
    train = _stream(config, policy, trained, training_windows(trained, steps * config.batch_size, config.seed))
    if config.eval_share and not held_back:
        raise ConfigError(
            f"eval_share = {config.eval_share:g}: of split {config.split!r} no photograph is held back; raise it"
        )
    evaluation = _stream(config, policy, held_back, evaluation_windows(held_back)) if held_back else None
    log.info("warm-up: %d steps of %d rows, %d ranks", steps, config.batch_size, config.learner.num_ranks)
    return WarmupJob(config, policy, output, settings, steps, train, evaluation)


def _stream(config: WarmupConfig, policy: str, shards: Sequence[Shard], windows: Sequence[Any]) -> RowStream:
    return RowStream(
        as_folder(config.data).child(ACCEPTED),
        tuple(shards),
        tuple(windows),
        batch_size=config.batch_size,
        policy=policy,
        prompt=config.prompt,
        max_pixels=config.max_pixels,
        max_length=config.max_length,
    )


# --- checks before anything is started -------------------------------------------------------------------------------


def _check_split(config: WarmupConfig, splits: Sequence[str]) -> None:
    folder = as_folder(config.data)
    names = [*sorted(splits), *(folder.read_json(SUBSETS) if folder.exists(SUBSETS) else ())]
    if config.split not in names:
        raise ConfigError(f"split = {config.split!r}: {config.data} has {', '.join(map(repr, names))}")


def _refuse_quantised(folder: str, policy: str) -> None:
    if "quantization_config" in read_config(Path(folder), "policy"):
        raise ConfigError(
            f"policy = {policy!r} is quantised (quantization_config in {folder}/config.json), and QLoRA is out of "
            "scope; take the checkpoint in bfloat16"
        )


def _check_ranks(config: WarmupConfig) -> None:
    """Refuse a cluster of this machine's own that is too small. One that is joined may grow."""
    learner = config.learner
    if not config.ray.local:
        return
    num_cpus = ray.cluster_resources().get("CPU", 0) if ray.is_initialized() else config.ray.local_cpus
    num_ranks = config.min_ranks or learner.num_ranks
    needed = num_ranks * learner.num_cpus_per_rank + READER_CPUS + ENCODER_CPUS
    if needed > num_cpus:
        raise ConfigError(
            f"ray.num_cpus: {num_cpus:g} logical CPUs are too few for {num_ranks} ranks of "
            f"learner.num_cpus_per_rank = {learner.num_cpus_per_rank:g} and {READER_CPUS + ENCODER_CPUS:g} to read and "
            f"encode rows; raise it to {needed:g} (there may be fewer real ones) or lower learner.num_cpus_per_rank"
        )


# --- Ray Train -------------------------------------------------------------------------------------------------------


def _fit(job: WarmupJob) -> None:
    """Run the ranks to the last step. On Ctrl-C let them save their step first, within `saving_time_s`."""
    scratch = job.output / "ray_train"
    shutil.rmtree(scratch, ignore_errors=True)  # Ray Train would continue a run of the same name
    pool = ThreadPoolExecutor(1)  # in a thread Ray Train leaves Ctrl-C alone; its handler would exit with status 0
    fitted = pool.submit(_trainer(job, scratch).fit)
    try:
        fitted.result()
    except KeyboardInterrupt:
        log.info("stopping after this step, within %g s; interrupt again to stop at once", saving_time_s())
        job.stop_file.touch()
        wait([fitted], timeout=saving_time_s())
        if fitted.done() and (error := fitted.exception()) is not None:
            log.error("the step was not saved: %r", error)
        raise
    finally:
        pool.shutdown(wait=False)
        job.stop_file.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _trainer(job: WarmupJob, scratch: Path) -> TorchTrainer:
    learner, least = job.config.learner, job.config.min_ranks
    resources = {"CPU": learner.num_cpus_per_rank}
    if learner.num_gpus_per_rank:
        resources["GPU"] = learner.num_gpus_per_rank
    return TorchTrainer(
        functools.partial(train_rank, job),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(least, learner.num_ranks) if 0 < least < learner.num_ranks else learner.num_ranks,
            use_gpu=learner.num_gpus_per_rank > 0,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="warmup",
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(max_failures=MAX_RESTARTS),
        ),
    )
