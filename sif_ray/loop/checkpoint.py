"""Checkpoints of a GRPO run: all that a driver needs to go on where another one stopped.

    checkpoints/step-000012/    the state after 12 training steps (`sif_ray.checkpoints`)
        learner/                weights, optimiser, step count and random numbers, as the ranks write them
        groups.parquet          groups that were scored and not trained; their images are in the dataset
        state.json              ledger, progress record, settings of the run, sizes of all files; written last

The files of this module are data and never run code; the learner's are DeepSpeed's, which can: continue only from
checkpoints of your own.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sif_ray.checkpoints import CheckpointError, CheckpointFolder, digest_files, digest_folder, flat_settings
from sif_ray.clock import now_s
from sif_ray.config import GrpoConfig
from sif_ray.records import Rollout, RolloutGroup, Sample, ScoredGroup

log = logging.getLogger(__name__)

GROUPS, LEARNER = "groups.parquet", "learner"

MAY_CHANGE = (
    *("data", "policy", "output"),  # paths: what is in them counts
    *("resume", "checkpoint_every", "checkpoints_kept", "lease_timeout_s", "stuck_after_s", "trackers"),
    *("eval_every", "eval_split", "eval_samples", "parity_every", "parity_alarm"),
    *("num_engines", "num_reward_workers", "weight_transfer", "engine", "placement", "ray"),
    *("learner.num_cpus_per_rank", "learner.num_gpus_per_rank", "learner.threads"),
    *("learner.micro_batch_tokens", "learner.gradient_checkpointing"),
    *("judge.base_url", "judge.api_key_env", "judge.max_concurrency", "judge.requests_per_minute"),
    *("judge.timeout_s", "judge.max_retries", "judge.max_wait_s", "judge.usd_per_million_tokens"),
    *("judge.breaker_failures", "judge.breaker_cooldown_s"),
)
"""Keys and blocks of `GrpoConfig` that say how a run is carried out, not what comes out of it. All others must agree
with the checkpoint that a run continues from."""


@dataclass(frozen=True)
class RunState:
    """What a run continues from, beside the learner's own files."""

    ledger: dict[str, Any]  # Ledger.state_dict
    record: dict[str, Any]  # ProgressRecord.state_dict
    groups: Mapping[str, ScoredGroup]  # by ticket id: those that `ledger` has as scored

    @property
    def version(self) -> int:
        """Training steps done."""
        return int(self.ledger["version"])


class LearnerFiles(Protocol):
    """The part of `sif_ray.learner.actor.LearnerGroup` that writes a checkpoint."""

    async def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one run with `settings` (`run_settings`); the newest `keep` stay.

    Example:
        checkpoints = Checkpoints(Path("runs/grpo/checkpoints"), run_settings(config, samples), keep=2)
        await checkpoints.save(state, learner)
        version = checkpoints.newest_version()  # None without a checkpoint
        state = checkpoints.load(version, images_of=lambda sample_id: (samples[sample_id].image,))
        await learner.load_checkpoint(checkpoints.learner_folder(version))
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], keep: int) -> None:
        self.folder = CheckpointFolder(folder, settings, keep)
        self.settings = settings

    def newest_version(self) -> int | None:
        """The version of the newest complete checkpoint."""
        return self.folder.newest()

    def learner_folder(self, version: int) -> str:
        """Where the learner's files of a checkpoint are."""
        return str(self.folder.path(version) / LEARNER)

    async def save(self, state: RunState, learner: LearnerFiles) -> None:
        """Write the state and the learner, which must hold `state.version`. A version that is there stays as it is."""
        path = self.folder.path(state.version)
        if path.exists():
            return
        started_s = now_s()
        part = self.folder.begin(state.version)
        await learner.save_checkpoint(str(part / LEARNER), {"version": state.version})
        if not (part / LEARNER).is_dir():
            raise CheckpointError(
                f"{part / LEARNER}: the learner wrote it, but not where the driver can see it; output must be a folder "
                "that all machines share"
            )
        await asyncio.to_thread(self._complete, part, state)
        seconds = now_s() - started_s
        log.info("checkpoint with %d scored groups, written in %.1f s: %s", len(state.groups), seconds, path)

    def load(self, version: int, images_of: Callable[[str], tuple[bytes, ...]]) -> RunState:
        """The state of a checkpoint; `images_of` gives the encoded images of a sample's prompt.

        Raises `CheckpointError` naming the file that is damaged or the settings that differ.
        """
        saved = self._read(version)
        path = self.folder.path(version) / GROUPS
        state = RunState(saved["ledger"], saved["record"], _read_groups(path, images_of))
        if state.groups.keys() != state.ledger["scored"].keys():
            raise self.folder.damaged(path, "its groups are not those that the ledger has as scored")
        return state

    def check_newest(self) -> None:
        """Raise what `load` would raise for the newest checkpoint, before anything is started."""
        version = self.newest_version()
        if version is not None:
            self._read(version)

    def _read(self, version: int) -> dict[str, Any]:
        saved = self.folder.read(version)
        path = self.folder.path(version) / GROUPS
        if digest_files((path,)) != saved["groups_digest"]:
            raise self.folder.damaged(path, "its bytes are not those that were written")
        return saved

    def _complete(self, part: Path, state: RunState) -> None:
        _write_groups(part / GROUPS, state.groups.values())
        digest = digest_files((part / GROUPS,))
        saved = {"ledger": state.ledger, "record": state.record, "groups_digest": digest}
        self.folder.complete(state.version, saved)


# --- settings --------------------------------------------------------------------------------------------------------


def run_settings(config: GrpoConfig, samples: Iterable[Sample]) -> dict[str, Any]:
    """What must stay the same while a run is continued: {"group_size": 8, ..., "contents of policy": "9f86d0..."}.

    `config.policy` must be a folder. Its files and the samples count by their contents.
    """
    return flat_settings(config, MAY_CHANGE) | {
        "contents of policy": digest_folder(Path(config.policy)),
        "contents of data": _digest_samples(samples),
    }


def _digest_samples(samples: Iterable[Sample]) -> str:
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(repr((sample.sample_id, sample.question, sample.answer, sample.boxes)).encode())
        for image in (sample.image, sample.depth_image):
            whole.update(hashlib.sha256(image).digest())
    return whole.hexdigest()


# --- groups ----------------------------------------------------------------------------------------------------------

_IDS, _FLOATS, _PAIRS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.list_(pa.int32()))
_ROLLOUT = pa.struct(
    [
        ("token_ids_T", _IDS),
        ("logprobs_T", _FLOATS),
        ("version_spans", _PAIRS),
        ("finish_reason", pa.string()),
        ("text", pa.string()),
    ]
)
GROUP_SCHEMA = pa.schema(
    [
        ("ticket_id", pa.string()),
        ("sample_id", pa.string()),
        ("prompt_token_ids_P", _IDS),
        ("image_grid_thw", _PAIRS),
        ("rollouts", pa.list_(_ROLLOUT)),
        ("rewards_G", _FLOATS),
        ("terms_G", pa.map_(pa.string(), _FLOATS)),
    ]
)
"""Columns of groups.parquet: the fields of `ScoredGroup` and what is inside it, without the images."""


def _write_groups(path: Path, groups: Iterable[ScoredGroup]) -> None:
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist([_to_row(scored) for scored in groups], schema=GROUP_SCHEMA), file)


def _to_row(scored: ScoredGroup) -> dict[str, Any]:
    group = scored.group
    return {
        "ticket_id": group.ticket_id,
        "sample_id": group.sample_id,
        "prompt_token_ids_P": group.prompt_token_ids_P,
        "image_grid_thw": [list(grid) for grid in group.image_grid_thw],
        "rollouts": [
            {name: getattr(rollout, name) for name in ("token_ids_T", "logprobs_T", "finish_reason", "text")}
            | {"version_spans": [list(span) for span in rollout.version_spans]}
            for rollout in group.rollouts
        ],
        "rewards_G": scored.rewards_G,
        "terms_G": list(scored.terms_G.items()),
    }


def _read_groups(path: Path, images_of: Callable[[str], tuple[bytes, ...]]) -> dict[str, ScoredGroup]:
    rows = pq.read_table(path, schema=GROUP_SCHEMA).to_pylist()
    return {row["ticket_id"]: _from_row(row, images_of(row["sample_id"])) for row in rows}


def _from_row(row: dict[str, Any], images: tuple[bytes, ...]) -> ScoredGroup:
    group = RolloutGroup(
        ticket_id=row["ticket_id"],
        sample_id=row["sample_id"],
        prompt_token_ids_P=np.asarray(row["prompt_token_ids_P"], np.int32),
        images=images,
        image_grid_thw=tuple((time, height, width) for time, height, width in row["image_grid_thw"]),
        rollouts=tuple(_rollout(saved) for saved in row["rollouts"]),
    )
    terms_G = {name: np.asarray(values, np.float32) for name, values in row["terms_G"]}
    return ScoredGroup(group, np.asarray(row["rewards_G"], np.float32), terms_G)


def _rollout(saved: dict[str, Any]) -> Rollout:
    return Rollout(
        token_ids_T=np.asarray(saved["token_ids_T"], np.int32),
        logprobs_T=np.asarray(saved["logprobs_T"], np.float32),
        version_spans=tuple((version, count) for version, count in saved["version_spans"]),
        finish_reason=saved["finish_reason"],
        text=saved["text"],
    )
