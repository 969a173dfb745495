"""One rank of the learner: a policy under DeepSpeed and what is done to it.

An update of the weights is any number of forward and backward passes, one per micro-batch. Every token carries a weight
that is normalised over the whole update and all ranks, so the result does not depend on how it is cut into
micro-batches or spread over ranks. A rank with fewer micro-batches than the others repeats one at weight zero, or
another rank's if it has none, because every pass is a collective operation under ZeRO.

Dimension suffixes: G rollouts of a group, M predicted tokens of a micro-batch.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig

from sif_ray.config import LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.learner import process_group
from sif_ray.learner.advantages import group_advantages
from sif_ray.learner.checkpoint_files import (
    damaged_files,
    random_state,
    rank_file,
    set_random_state,
    told_by_the_disk,
)
from sif_ray.learner.microbatches import pack, split_branches
from sif_ray.learner.objective import grpo_loss, token_weights
from sif_ray.learner.schedule import learning_rate
from sif_ray.policy.adapter import (
    REFERENCE,
    TRAINED,
    MergedWeight,
    adapter_weights,
    add_adapter,
    load_adapter,
    merged_weights,
    starting_adapter,
    with_adapter,
)
from sif_ray.policy.branches import BranchedBatch, BranchedSequence, branch_logprobs, collate
from sif_ray.policy.model import freeze_vision, load_policy, resolve_model, save_policy, unfinished
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.shards import skeleton
from sif_ray.policy.stored_adapter import adapter_of
from sif_ray.policy.universal import mend_optimizer, to_universal
from sif_ray.records import RolloutGroup, ScoredGroup

log = logging.getLogger(__name__)

ADAM_BETAS = (0.9, 0.95)  # a memory of 20 steps for the second moment: runs are a few hundred steps, not 100,000
BUCKET_BYTES = 64 * 2**20  # of weights gathered and handed over at a time

Columns = dict[str, np.ndarray]
"""Per-token inputs of the loss by name, each (M,), in the order of a sequence's predicted tokens."""


class LearnerError(RuntimeError):
    """The step cannot be done; the message says what to change."""


@dataclass(frozen=True)
class _Piece:
    """What one row of a micro-batch holds: a packed sequence and its loss inputs."""

    sequence: BranchedSequence
    columns: Columns


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward and backward pass takes. The loss may add columns, which stay for later updates."""

    sequences: Sequence[BranchedSequence]
    columns: dict[str, Tensor]  # each (M,), on the device
    idle: bool = False  # a repetition at weight zero

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


class _Scorer(nn.Module):
    """Log-probs and entropies as the output of a module, so that DeepSpeed sees one forward pass."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Any, temperature: float) -> tuple[Tensor, Tensor]:
        self.train(torch.is_grad_enabled())  # dropout and recomputation belong to passes that have a backward pass
        return branch_logprobs(self.policy, batch, temperature)


class LearnerEngine:
    """Trains the policy of a checkpoint by GRPO steps or supervised steps.

    Runs without Ray. Ranks come from the process group the process is in (`process_group.join`); without one it is a
    group of one.

    Example:
        engine = LearnerEngine(LearnerConfig(), "runs/warmup/checkpoint", total_steps=100, objective=ObjectiveConfig())
        metrics = engine.train_step(groups, version=0)
        engine.save_policy("runs/grpo/checkpoint")
    """

    def __init__(
        self,
        config: LearnerConfig,
        policy: str,
        *,
        total_steps: int,
        objective: ObjectiveConfig | None = None,
        sampling: SamplingConfig | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """`total_steps` optimiser updates are the length of the learning-rate schedule. `objective` None = supervised
        steps only.

        `sampling` is that of the rollouts: log-probs of `train_step` and `log_probs` are taken at its temperature. The
        reference of the KL is the starting policy: with LoRA the policy without its adapter, else a frozen copy that is
        held when `objective.kl_beta` > 0.
        """
        torch.set_num_threads(config.threads)
        process_group.join()
        self._deepspeed = process_group.load_deepspeed()
        self._config, self._source, self._total_steps = config, policy, total_steps
        self._objective, self._sampling = objective, sampling or SamplingConfig()
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        )
        self._processor = PolicyProcessor(policy, max_pixels)
        model = load_policy(policy, config.dtype)
        _choose_trained(model, policy, config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(dist.get_rank())  # of dropout
        self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
            model=_Scorer(model), optimizer=_optimizer(model, config), config=deepspeed_config(config)
        )
        self._policy = model
        copied = objective is not None and objective.kl_beta > 0 and not config.lora.rank
        self._reference = self._load_reference() if copied else self._engine

    # --- training ----------------------------------------------------------------------------------------------------

    def train_step(self, groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
        """From one policy version to the next on this rank's scored groups: `objective.updates_per_batch` updates.

        Returns the metrics of all ranks together, equal on every rank, as means over the updates; shares and means are
        of tokens, and `staleness/<age>` is the share of tokens written that many versions before `version`, the one
        being trained. The log-probs of the first update's own forward pass are those of the proximal policy.

        A rank may have no group. Raises `LearnerError` when none has one, tokens are newer than `version`, images do
        not fit their prompt or the loss is not finite.
        """
        if self._objective is None:
            raise LearnerError("train_step needs an objective; give LearnerEngine(objective=ObjectiveConfig(...))")
        num_rollouts = int(self._total(sum(len(group.rewards_G) for group in groups), "groups"))
        num_tokens = int(self._total(sum(scored.group.num_tokens for scored in groups), "completion tokens"))
        staleness = self._staleness(groups, version, num_tokens)
        pieces = [piece for group in groups for piece in self._group_pieces(group, num_rollouts, num_tokens)]
        micro_batches = self._micro_batches(pieces)
        updates = [self._update(micro_batches, self._grpo_loss) for _ in range(self._objective.updates_per_batch)]
        sums = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        return {
            "loss": sums["loss"],
            "kl": sums["kl"] / num_tokens,
            "entropy": sums["entropy"] / num_tokens,
            "ratio_mean": sums["ratio"] / num_tokens,
            "clip_share": (sums["clipped_low"] + sums["clipped_high"]) / num_tokens,
            "clip_low_share": sums["clipped_low"] / num_tokens,
            "clip_high_share": sums["clipped_high"] / num_tokens,
            "is_weight_mean": sums["importance"] / num_tokens,
            "is_truncated_share": sums["truncated"] / num_tokens,
            "grad_norm": sums["grad_norm"],
            "lr": sums["lr"],
            "trained_tokens": sums["tokens"],
            "padding_share": sums["padding_share"],
            **staleness,
        }

    def sft_step(self, sequences: Sequence[BranchedSequence]) -> dict[str, float]:
        """One supervised update: mean over the predicted tokens of all ranks of -log p, at temperature 1.

        A rank may have no sequence. Raises `LearnerError` when none has one or the loss is not finite.
        """
        total_tokens = self._total(sum(map(_num_predicted, sequences)), "predicted tokens")
        sums = self._update(self._micro_batches(self._sft_pieces(sequences, 1.0 / total_tokens)), self._sft_loss)
        return {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / sums["tokens"],
            "grad_norm": sums["grad_norm"],
            "lr": sums["lr"],
            "trained_tokens": sums["tokens"],
            "padding_share": sums["padding_share"],
        }

    def sft_loss(self, sequences: Sequence[BranchedSequence]) -> tuple[float, int]:
        """Sum over the predicted tokens of all ranks of -log p, and their number, perhaps 0; nothing is trained."""
        num_tokens = int(self._reduce(sum(map(_num_predicted, sequences)), dist.ReduceOp.SUM))
        if num_tokens == 0:
            return 0.0, 0
        loss = 0.0
        with torch.no_grad():
            for micro_batch in self._micro_batches(self._sft_pieces(sequences, 1.0)):
                part, _ = self._sft_loss(self._collate(micro_batch.sequences), micro_batch.columns)
                loss += 0.0 if micro_batch.idle else float(part)
        return self._reduce(loss, dist.ReduceOp.SUM), num_tokens

    @property
    def step(self) -> int:
        """Optimiser updates done, also over resumed runs."""
        return int(self._engine.global_steps)

    def _sft_pieces(self, sequences: Sequence[BranchedSequence], weight: float) -> list[_Piece]:
        return [
            _Piece(part, {"weight": np.full(_num_predicted(part), weight, dtype=np.float32)})
            for sequence in sequences
            for part, _ in _split(sequence, self._config.micro_batch_tokens)
        ]

    def _micro_batches(self, pieces: Sequence[_Piece]) -> list[_MicroBatch]:
        """The pieces in micro-batches within the token budget, as many on every rank."""
        packed = pack([piece.sequence.num_tokens for piece in pieces], self._config.micro_batch_tokens)
        made = [self._micro_batch([pieces[index] for index in chosen]) for chosen in packed]
        passes = int(self._reduce(len(made), dist.ReduceOp.MAX))
        lent = self._lent_piece(pieces)
        filler = made[-1] if made else self._micro_batch([lent])
        idle = [replace(filler, columns=dict(filler.columns), idle=True) for _ in range(passes - len(made))]
        return made + idle

    def _lent_piece(self, pieces: Sequence[_Piece]) -> _Piece | None:
        """The smallest piece of a rank that has some, when another has none; else None."""
        counts: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, len(pieces))
        if min(counts) > 0:
            return None
        lender = counts.index(max(counts))
        lent = [min(pieces, key=lambda piece: piece.sequence.num_tokens) if dist.get_rank() == lender else None]
        dist.broadcast_object_list(lent, src=lender, device=self._device)
        return lent[0]

    def _micro_batch(self, pieces: Sequence[_Piece]) -> _MicroBatch:
        columns = {
            name: torch.from_numpy(np.concatenate([piece.columns[name] for piece in pieces])).to(self._device)
            for name in pieces[0].columns
        }
        return _MicroBatch([piece.sequence for piece in pieces], columns)

    def _update(
        self, micro_batches: Sequence[_MicroBatch], loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    ) -> dict[str, float]:
        """One update of the weights; the sums over all ranks of what `loss_of` gives."""
        rate = learning_rate(
            self.step,
            self._total_steps,
            peak=self._config.learning_rate,
            schedule=self._config.lr_schedule,
            warmup_share=self._config.warmup_share,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches) - 1)
            batch = self._collate(micro_batch.sequences)
            loss, terms = loss_of(batch, micro_batch.columns)
            weight = 0.0 if micro_batch.idle else dist.get_world_size()  # DeepSpeed takes the mean over ranks
            self._engine.backward(loss * weight, scale_wrt_gas=False)
            terms |= {"loss": loss.detach(), "input_tokens": loss.new_tensor(micro_batch.num_tokens)}
            if micro_batch.idle:
                terms = {name: torch.zeros_like(value) for name, value in terms.items()}
            terms["positions"] = loss.new_tensor(batch.input_ids.numel())
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value
        totals = torch.stack([sums[name].float() for name in sorted(sums)])
        dist.all_reduce(totals)
        metrics = dict(zip(sorted(sums), totals.tolist(), strict=True))
        self._refuse_unless_finite("loss", metrics["loss"], rate)
        plain_norm = self._plain_gradient_norm()
        self._engine.step()
        reported_norm = self._engine.get_global_grad_norm()
        metrics["grad_norm"] = plain_norm if reported_norm is None else float(reported_norm)
        self._refuse_unless_finite("gradient norm", metrics["grad_norm"], rate)
        metrics["lr"] = rate
        metrics["padding_share"] = 1 - metrics["input_tokens"] / metrics["positions"]  # idle micro-batches included
        return metrics

    def _plain_gradient_norm(self) -> float:
        """Norm of the gradients where DeepSpeed reports none: without ZeRO they are plain and equal on every rank."""
        gradients = [parameter.grad for parameter in self._policy.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if self._config.zero_stage == 0 else math.nan

    def _refuse_unless_finite(self, name: str, value: float, rate: float) -> None:
        if not math.isfinite(value):
            raise LearnerError(
                f"step {self.step}: the {name} is {value}; lower learner.learning_rate ({rate:.3g} now) and resume "
                "from the last checkpoint"
            )

    def _sft_loss(self, batch: Any, columns: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_M, entropies_M = self._engine(batch, 1.0)
        return -(columns["weight"] * logprobs_M).sum(), {
            "entropy": entropies_M.sum(),
            "tokens": torch.ones_like(entropies_M).sum(),
        }

    def _grpo_loss(self, batch: BranchedBatch, columns: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self._objective.kl_beta > 0 and "reference_logprob" not in columns:
            with torch.no_grad(), with_adapter(self._policy, REFERENCE):
                columns["reference_logprob"], _ = self._reference(batch, self._sampling.temperature)
        logprobs_M, entropies_M = self._engine(batch, self._sampling.temperature)
        loss, terms = grpo_loss(
            self._objective,
            logprobs_N=logprobs_M,
            proximal_logprobs_N=columns.setdefault("proximal_logprob", logprobs_M.detach()),
            behaviour_logprobs_N=columns["behaviour_logprob"],
            reference_logprobs_N=columns.get("reference_logprob"),
            advantages_N=columns["advantage"],
            weights_N=columns["weight"],
            sequence_N=batch.branch_M,
            num_sequences=batch.num_branches,
        )
        return loss, {
            "kl": terms.kl_N.sum(),
            "entropy": entropies_M.sum(),
            "ratio": terms.ratio_N.sum(),
            "clipped_low": terms.clipped_low_N.sum(),
            "clipped_high": terms.clipped_high_N.sum(),
            "importance": terms.importance_N.sum(),
            "truncated": terms.truncated_N.sum(),
            "tokens": torch.ones_like(entropies_M).sum(),
        }

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _group_sequence(self, group: RolloutGroup) -> BranchedSequence:
        features = self._processor.image_features(group.images)
        grid = tuple(tuple(int(size) for size in row) for row in features["image_grid_thw"])
        if grid != tuple(group.image_grid_thw):
            raise LearnerError(
                f"group {group.ticket_id} ({group.sample_id}): the learner cuts its images into {grid} patches, "
                f"the engine into {group.image_grid_thw}; give both the same max_pixels"
            )
        return BranchedSequence(
            prefix_ids=group.prompt_token_ids_P,
            branches=[rollout.token_ids_T for rollout in group.rollouts],
            pixel_values=features["pixel_values"],
            image_grid_thw=grid,
        )

    def _group_pieces(self, scored: ScoredGroup, num_rollouts: int, num_tokens: int) -> list[_Piece]:
        rollouts = scored.group.rollouts
        advantages_G = group_advantages(scored.rewards_G, normalise=self._objective.advantage_norm)
        weights_G = token_weights(
            self._objective.loss_mean,
            [len(rollout.token_ids_T) for rollout in rollouts],
            num_sequences=num_rollouts,
            num_tokens=num_tokens,
            max_tokens=self._sampling.max_tokens,
        )
        pieces = []
        for part, chosen in _split(self._group_sequence(scored.group), self._config.micro_batch_tokens):
            lengths = [len(rollouts[index].token_ids_T) for index in chosen]
            columns = {
                "behaviour_logprob": np.concatenate([rollouts[index].logprobs_T for index in chosen]),
                "advantage": np.repeat(advantages_G[chosen], lengths),
                "weight": np.repeat([weights_G[index] for index in chosen], lengths).astype(np.float32),
            }
            pieces.append(_Piece(part, columns))
        return pieces

    def _collate(self, sequences: Sequence[BranchedSequence]) -> BranchedBatch:
        return collate(sequences, self._policy, self._processor.pad_token_id).to(self._device)

    # --- reading the policy ------------------------------------------------------------------------------------------

    def log_probs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        """Log-probs of every rollout's tokens under the current weights, [group][rollout] (T,) float32.

        For the parity probe. Every rank must be given the same groups.
        """
        found: list[list[np.ndarray]] = []
        for group in groups:
            found.append([])
            for part, _ in _split(self._group_sequence(group), self._config.micro_batch_tokens):
                with torch.no_grad():
                    logprobs_M, _ = self._engine(self._collate([part]), self._sampling.temperature)
                lengths = [len(branch) for branch in part.branches]
                found[-1] += [chunk.float().cpu().numpy() for chunk in logprobs_M.split(lengths)]
        return found

    def weight_buckets(
        self, bucket_bytes: int = BUCKET_BYTES, *, own: bool = True
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Every weight once as (Hugging Face name, CPU tensor of its own), in buckets of about `bucket_bytes`: frozen
        ones too, and with LoRA the merged ones. Without `own` a tensor holds its values only until the next bucket is
        asked for, and on a CPU no copy is made of it.

        Under ZeRO-3 a bucket is gathered at a time, never the whole model, and every rank must iterate to the end;
        ranks other than 0 get empty buckets. The policy itself is not changed.
        """
        for bucket in _buckets(merged_weights(self._policy), bucket_bytes):
            gather = self._deepspeed.zero.GatheredParameters(
                [parameter for weight in bucket for parameter in weight.parameters],
                enabled=self._config.zero_stage == 3,
            )
            with gather:
                yield [(weight.name, weight.value().to("cpu", copy=own)) for weight in bucket] if self._is_first else []

    def save_policy(self, output: str) -> None:
        """Write the weights (merged, with LoRA) as a Hugging Face checkpoint folder; every rank must call."""
        tensors = (pair for bucket in self.weight_buckets() for pair in bucket)
        if self._is_first:
            save_policy(self._policy, self._source, output, tensors)
        for _ in tensors:  # the other ranks take part in the gathers
            pass
        dist.barrier()

    def save_adapter(self, output: str, base: str) -> None:
        """Write the adapter alone as a folder of peft's layout that names `base`; every rank must call."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in adapter_weights(self._policy):
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._config.zero_stage == 3):
                if self._is_first:
                    tensors[name] = parameter.detach().to("cpu", copy=True)
        if self._is_first:
            folder = resolve_model(self._source)
            stored = adapter_of(tensors, skeleton(AutoConfig.from_pretrained(folder)), self._config.lora.alpha)
            with unfinished(Path(output)) as part:
                stored.save(part, base)
        dist.barrier()

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        """Write what the next step depends on to `folder`, with `client_state` (plain values); every rank must call.

        That is the trained weights, the optimiser, the step count and every rank's random numbers: an engine that loads
        it goes on exactly as this one would. Frozen weights are not written; they are those of the policy's checkpoint.
        Raises `OSError` when the disk takes no more.
        """
        tag = f"step{self.step}"
        with told_by_the_disk(Path(folder)):
            self._engine.save_checkpoint(
                folder, tag=tag, client_state={"sif_ray": client_state}, exclude_frozen_parameters=True
            )
            own = {"layout": self._layout(), "random_state": random_state()}
            torch.save(own, Path(folder) / tag / rank_file(dist.get_rank()))
        dist.barrier()

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Continue from the newest checkpoint in `folder` and return its client state; every rank must call.

        Another number of ranks than wrote it goes on with the same weights and optimiser, but other random numbers of
        dropout; its first rank writes the states of all ranks once more beside the checkpoint while they are read.

        Under ZeRO-3 load into a fresh engine. Raises `LearnerError` when there is none, or one that is damaged or was
        written with another ZeRO stage or choice of trained weights.
        """
        latest = Path(folder) / "latest"
        if not latest.is_file():
            raise LearnerError(f"{folder}: no checkpoint to resume from")
        written = Path(folder) / latest.read_text().strip()
        damaged = damaged_files(sorted(written.glob("*.pt")))
        if damaged:
            raise LearnerError(
                f"{damaged[0]}: damaged (its bytes are not those that were written); remove the folder of this "
                "checkpoint to continue from the one before it"
            )
        first = torch.load(written / rank_file(0))
        saved, layout = dict(first["layout"]), self._layout()
        num_ranks, ranks_now = saved.pop("num_ranks"), layout.pop("num_ranks")
        if saved != layout:
            raise LearnerError(
                f"{written}: was written with {saved}, this learner has {layout}; resume with the same "
                "learner.zero_stage, lora and freeze_vision"
            )
        if num_ranks == ranks_now:
            _, state = self._engine.load_checkpoint(folder, load_module_strict=False)
            set_random_state(torch.load(written / rank_file(dist.get_rank()))["random_state"])
        elif self._config.zero_stage == 0:  # every rank has all
            _, state = self._engine.load_checkpoint(folder, load_module_strict=False)
        else:
            state = self._load_divided_anew(written)
        return dict(state["sif_ray"])

    def _load_divided_anew(self, written: Path) -> dict[str, Any]:
        """Load what another number of ranks wrote, by way of a universal checkpoint."""
        universal = written.with_name(f"{written.name}_universal")
        if self._is_first:
            shutil.rmtree(universal, ignore_errors=True)
            to_universal(written, universal)
        dist.barrier()
        weight_decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        config = self._engine._config
        config.load_universal_checkpoint = True  # DeepSpeed knows the wish only as a part of its configuration
        _, state = self._engine.load_checkpoint(str(written.parent), tag=universal.name, load_module_strict=False)
        config.load_universal_checkpoint = False
        if self._config.zero_stage == 3:
            mend_optimizer(self._optimizer.optimizer, weight_decays)
        dist.barrier()
        if self._is_first:
            shutil.rmtree(universal)
        return dict(state)

    def _layout(self) -> dict[str, int]:
        return {
            "num_ranks": dist.get_world_size(),
            "zero_stage": self._config.zero_stage,
            "trained_weights": sum(_numel(weights) for weights in self._policy.parameters() if weights.requires_grad),
        }

    def close(self) -> None:
        """Leave the process group. The engine cannot be used afterwards."""
        self._engine.destroy()
        dist.destroy_process_group()

    # --- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _is_first(self) -> bool:
        return dist.get_rank() == 0

    def _load_reference(self) -> nn.Module:
        scorer = _Scorer(load_policy(self._source, self._config.dtype)).requires_grad_(False).eval()
        if self._config.zero_stage < 3:
            return scorer.to(self._device)
        config = deepspeed_config(self._config)
        reference, *_ = self._deepspeed.initialize(model=scorer, config=config)
        return reference

    def _reduce(self, value: float, operation: Any) -> float:
        tensor = torch.tensor(float(value), dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, operation)
        return float(tensor)

    def _staleness(self, groups: Sequence[ScoredGroup], version: int, num_tokens: int) -> dict[str, float]:
        ages = _token_staleness(groups, version)
        oldest = int(self._reduce(int(ages.max(initial=0)), dist.ReduceOp.MAX))
        tokens_by_age = torch.from_numpy(np.bincount(ages, minlength=oldest + 1)).to(self._device)
        dist.all_reduce(tokens_by_age)
        shares = (tokens_by_age / num_tokens).tolist()
        return {
            "staleness_mean": sum(age * share for age, share in enumerate(shares)),
            "staleness_max": float(oldest),
            **{f"staleness/{age}": share for age, share in enumerate(shares)},
        }

    def _total(self, count: int, unit: str) -> float:
        total = self._reduce(count, dist.ReduceOp.SUM)
        if total == 0:
            raise LearnerError(f"no rank has {unit} to train on; a step needs at least one")
        return total


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """The DeepSpeed configuration of a learner, with the keys of `config.deepspeed` put over it.

    In bfloat16 the passes and the sum of their gradients are bfloat16, the optimiser's copy of the weights is float32;
    {"data_types": {"grad_accum_dtype": "fp32"}} sums in float32 too, for twice the memory (from ZeRO stage 1 on).
    The micro-batch and accumulation counts are formal: the engine marks the end of a step itself.
    """
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded states are updated by torch's AdamW, too
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    return _merged(ours, config.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _choose_trained(policy: nn.Module, source: str, config: LearnerConfig) -> None:
    if config.lora.adapter:
        start = starting_adapter(config.lora, source)
        load_adapter(policy, start, config.lora.dropout, TRAINED)
        load_adapter(policy, start, 0.0, REFERENCE)
    elif config.lora.rank:
        add_adapter(policy, config.lora)
    elif config.freeze_vision:
        freeze_vision(policy)


def _optimizer(model: nn.Module, config: LearnerConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices only. torch's own needs no compiler, unlike DeepSpeed's."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=ADAM_BETAS)


def _split(sequence: BranchedSequence, budget: int) -> Iterator[tuple[BranchedSequence, list[int]]]:
    """Parts of a sequence within the token budget, and which branches each has."""
    for chosen in split_branches(len(sequence.prefix_ids), [len(branch) for branch in sequence.branches], budget):
        yield sequence.choose(chosen), chosen


def _num_predicted(sequence: BranchedSequence) -> int:
    if sequence.loss_masks is None:
        return sum(len(branch) for branch in sequence.branches)
    return sum(int(np.sum(mask)) for mask in sequence.loss_masks)


def _token_staleness(groups: Sequence[ScoredGroup], version: int) -> np.ndarray:
    """Versions between the learner and each trained token; a token from the future is a `LearnerError`."""
    for scored in groups:
        if scored.group.newest_version > version:
            raise LearnerError(
                f"group {scored.group.ticket_id}: version {scored.group.newest_version} wrote a part of it and the "
                f"learner trains version {version}; both must count versions from the same start"
            )
    spans = [span for scored in groups for rollout in scored.group.rollouts for span in rollout.version_spans]
    ages, counts = ([version - written for written, _ in spans], [count for _, count in spans])
    return np.repeat(np.asarray(ages, dtype=np.int64), np.asarray(counts, dtype=np.int64))  # a rank may have none


def _buckets(weights: Iterator[MergedWeight], bucket_bytes: int) -> Iterator[list[MergedWeight]]:
    bucket: list[MergedWeight] = []
    size = 0
    for weight in weights:
        num_bytes = sum(_numel(parameter) * parameter.element_size() for parameter in weight.parameters)
        if bucket and size + num_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += num_bytes
    if bucket:
        yield bucket


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3 its own count is 0 between gathers
