"""The suite `learner`: trained tokens per second beside a bare PyTorch loop, padding, and memory of the log-probs.

The same scored groups (a prompt with two images each, completions of long-tailed lengths) are trained in turns by

    learner   `LearnerEngine.train_step`: DeepSpeed, completions packed as branches of their prompt, micro-batches
    packed    the same rows and micro-batches in a bare loop: torch's AdamW, no DeepSpeed, whole logits; what the
              engine itself costs
    padded    what one writes with transformers alone: a row for each completion, its prompt and images repeated,
              sorted by length, padded in micro-batches of as many tokens, whole logits

in one process with one dtype and number of threads. Tokens are completion tokens, which is what the loss is over, on
all ways. Loss and gradient norm of the first step must agree. The objective is that of GRPO without a reference model,
which would cost all ways the same.

Memory is measured in a process for each way: a narrow policy with a vocabulary of real size gives log-probs and their
gradients, by `branch_logprobs` and from the logits of the whole sequence in float32.
"""

from __future__ import annotations

import io
import logging
import math
import multiprocessing
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from sif_ray.bench.findings import Findings, Goal, interleaved, share, spread
from sif_ray.config import LearnerConfig, ObjectiveConfig, PromptConfig
from sif_ray.learner.advantages import group_advantages
from sif_ray.learner.engine import ADAM_BETAS, LearnerEngine
from sif_ray.learner.microbatches import pack
from sif_ray.policy.branches import BranchedSequence, branch_logprobs, collate, hidden_states
from sif_ray.policy.model import load_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.random_policy import write_random_policy
from sif_ray.records import Rollout, RolloutGroup, ScoredGroup
from sif_ray.resources.shapes import PolicyShape

log = logging.getLogger(__name__)

SHARE_OF_BARE_LOOP = 0.9
PADDING_SHARE = 0.05
MEMORY_SHARE = 0.5  # of what whole logits take
AGREEMENT = 1e-3  # relative, of loss and gradients in float32

BRANCHES_SHAPE = PolicyShape(256, 4, 8, 4, 768, 600, False, 96, 2, 3, 192)
VOCABULARY_SHAPE = PolicyShape(128, 1, 4, 2, 256, 151_936, False, 96, 1, 3, 192)


@dataclass(frozen=True)
class Load:
    """How much work."""

    groups: int = 16  # of a step
    group_size: int = 8
    median_tokens: int = 40  # of a completion
    max_tokens: int = 320
    fixed_tokens: int = 0  # of every completion, in place of a tail; 0 = the tail
    micro_batch_tokens: int = 4096
    threads: int = 2
    warm_up: int = 1  # steps that do not count
    steps: int = 2  # of a turn
    shape: PolicyShape = BRANCHES_SHAPE
    vocabulary_shape: PolicyShape = VOCABULARY_SHAPE
    vocabulary_tokens: int = 2048  # of completions, about, in the measurement of memory


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Throughput, padding and memory."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        throughput = measure_throughput(Path(name), repetitions, load)
        memory = measure_memory(Path(name), repetitions, load)
    return Findings(throughput.goals + memory.goals, {"load": asdict(load), **throughput.figures, **memory.figures})


def quick() -> Findings:
    """Throughput of a small load against loose bounds, in a process of its own: DeepSpeed starts only once in one."""
    with (
        tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        found: Findings = pool.apply(measure_throughput, (Path(name), 3, Load(groups=6, steps=1)))
    of_fastest, padding = found.goals
    goals = [replace(of_fastest, goal=0.7), replace(padding, goal=0.15)]
    return Findings(goals, found.figures)


# --- throughput -------------------------------------------------------------------------------------------------------


def measure_throughput(folder: Path, repetitions: int, load: Load) -> Findings:
    """Trained tokens per second of the three ways."""
    policy = str(folder / "policy")
    write_random_policy(load.shape, policy, tokenizer="toy")
    groups = make_groups(policy, load)
    config = LearnerConfig(
        threads=load.threads,
        micro_batch_tokens=load.micro_batch_tokens,
        learning_rate=1e-6,
        lr_schedule="constant",
    )
    engine = LearnerEngine(config, policy, total_steps=1000, objective=ObjectiveConfig(kl_beta=0.0))
    first = engine.train_step(groups, version=0)
    bare = {"packed": PackedLoop(policy, config), "padded": PaddedLoop(policy, config)}
    found = {name: loop.step(groups) for name, loop in bare.items()}
    agreement = {
        name: max(_apart(loss, first["loss"], 1.0), _apart(norm, first["grad_norm"], 0.0))
        for name, (loss, norm) in found.items()
    }
    if max(agreement.values()) > AGREEMENT:
        raise RuntimeError(f"the ways differ in loss or gradient norm on the first step: {found}, {first}")
    steps: dict[str, Callable[[], Any]] = {"learner": lambda: engine.train_step(groups, version=0)}
    steps |= {name: partial(loop.step, groups) for name, loop in bare.items()}
    for step in steps.values():
        for _ in range(load.warm_up - 1):
            step()
    num_tokens = sum(scored.group.num_tokens for scored in groups)
    ways = {name: partial(_rate, name, step, load.steps, num_tokens) for name, step in steps.items()}
    rates = interleaved(ways, repetitions)
    of_fastest = min(share(rates["learner"], rates[name]) for name in bare)
    goals = [
        Goal("trained tokens/s, of the fastest bare loop", of_fastest, SHARE_OF_BARE_LOOP, at_least=True),
        Goal("share of padding tokens", first["padding_share"], PADDING_SHARE, at_least=False),
    ]
    lengths = [len(rollout.token_ids_T) for scored in groups for rollout in scored.group.rollouts]
    figures = {
        "tokens_of_a_step": num_tokens,
        "completion_tokens": {"median": statistics.median(lengths), "max": max(lengths)},
        "prompt_tokens": len(groups[0].group.prompt_token_ids_P),
        "tokens_per_s": {name: spread(values) for name, values in rates.items()},
        "padding_share": {"learner": first["padding_share"], "padded": bare["padded"].padding_share},
        "apart": agreement,
    }
    return Findings(goals, figures)


def _rate(name: str, step: Callable[[], Any], steps: int, num_tokens: int) -> float:
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    rate = steps * num_tokens / (time.perf_counter() - started_s)
    log.info("bench learner: %s, %.0f tokens/s", name, rate)
    return rate


def _apart(a: float, b: float, floor: float) -> float:
    """Relative difference of two numbers; those below `floor` are compared in its size."""
    return abs(a - b) / max(abs(a), abs(b), floor)


class BareLoop(ABC):
    """A policy, torch's AdamW and the GRPO loss, written out. Subclasses cut groups into micro-batches."""

    padding_share = math.nan

    def __init__(self, policy: str, config: LearnerConfig) -> None:
        torch.set_num_threads(config.threads)
        self._config = config
        self._processor = PolicyProcessor(policy)
        self._policy = self._load(policy).train()
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(), lr=config.learning_rate, betas=ADAM_BETAS, weight_decay=config.weight_decay
        )

    def step(self, groups: Sequence[ScoredGroup]) -> tuple[float, float]:
        """One update; loss and gradient norm."""
        sums = 0.0
        for logprobs_M, behaviour_M, advantages_M, weights_M in self._scored(groups):
            ratios_M = torch.exp(logprobs_M - logprobs_M.detach())
            clipped_M = ratios_M.clamp(0.8, 1.2)
            importance_M = torch.exp(logprobs_M.detach() - behaviour_M).clamp(max=2.0)
            surrogate_M = -torch.minimum(ratios_M * advantages_M, clipped_M * advantages_M)
            loss = (weights_M * importance_M * surrogate_M).sum()
            loss.backward()
            sums += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return sums, float(norm)

    @abstractmethod
    def _load(self, policy: str) -> nn.Module: ...

    @abstractmethod
    def _scored(self, groups: Sequence[ScoredGroup]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of every micro-batch: log-probs, behaviour log-probs, advantages and weights, each (M,)."""

    def _logprobs(self, logits_MV: Tensor, targets_M: Tensor) -> Tensor:
        logits_MV[:, self._policy.config.image_token_id] = -1e9  # as in the engine
        return torch.log_softmax(logits_MV.float(), dim=-1).gather(-1, targets_M[:, None]).squeeze(-1)


class PackedLoop(BareLoop):
    """The learner's own rows and micro-batches."""

    def _load(self, policy: str) -> nn.Module:
        return load_policy(policy)

    def _scored(self, groups: Sequence[ScoredGroup]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        sequences = [_branched(self._processor, scored.group) for scored in groups]
        for chosen in pack([sequence.num_tokens for sequence in sequences], self._config.micro_batch_tokens):
            batch = collate([sequences[index] for index in chosen], self._policy, self._processor.pad_token_id)
            hidden = hidden_states(self._policy, batch)
            logits_MV = self._policy.lm_head(hidden.flatten(0, 1)[batch.state_at_M])
            targets_M = batch.input_ids.flatten()[batch.target_at_M]
            columns = [_columns(groups[index], groups) for index in chosen]
            yield self._logprobs(logits_MV, targets_M), *(torch.cat(parts) for parts in zip(*columns, strict=True))


class PaddedLoop(BareLoop):
    """A row for each completion, neighbours in length in one micro-batch, padded to the longest."""

    def _load(self, policy: str) -> nn.Module:
        return AutoModelForImageTextToText.from_pretrained(policy, dtype=torch.float32)

    def _scored(self, groups: Sequence[ScoredGroup]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        rows = []  # prompt with completion, images, grids, columns
        for scored in groups:
            features = self._processor.image_features(scored.group.images)
            columns = _columns(scored, groups)
            lengths = [len(rollout.token_ids_T) for rollout in scored.group.rollouts]
            parts = zip(*(column.split(lengths) for column in columns), strict=True)
            for rollout, of_row in zip(scored.group.rollouts, parts, strict=True):
                prompt_ids = scored.group.prompt_token_ids_P
                rows.append((prompt_ids, rollout.token_ids_T, features, of_row))
        chosen_rows = pack([len(row[0]) + len(row[1]) for row in rows], self._config.micro_batch_tokens)
        used = sum(len(row[0]) + len(row[1]) for row in rows)
        positions = 0
        for chosen in chosen_rows:
            taken = [rows[index] for index in chosen]
            length = max(len(prompt) + len(completion) for prompt, completion, _, _ in taken)
            positions += length * len(taken)
            input_ids = torch.full((len(taken), length), self._processor.pad_token_id)
            mask = torch.zeros(len(taken), length, dtype=torch.long)
            for number, (prompt, completion, _, _) in enumerate(taken):
                ids = torch.from_numpy(np.concatenate([prompt, completion])).long()
                input_ids[number, : len(ids)] = ids
                mask[number, : len(ids)] = 1
            logits = self._policy(
                input_ids=input_ids,
                attention_mask=mask,
                mm_token_type_ids=(input_ids == self._policy.config.image_token_id).int(),
                pixel_values=torch.from_numpy(np.concatenate([row[2]["pixel_values"] for row in taken])),
                image_grid_thw=torch.from_numpy(np.concatenate([row[2]["image_grid_thw"] for row in taken])),
                use_cache=False,
            ).logits
            spans = [(len(prompt), len(prompt) + len(completion)) for prompt, completion, _, _ in taken]
            logits_MV = torch.cat([logits[number, a - 1 : b - 1] for number, (a, b) in enumerate(spans)])
            targets_M = torch.cat([input_ids[number, a:b] for number, (a, b) in enumerate(spans)])
            columns = [torch.cat(parts) for parts in zip(*(row[3] for row in taken), strict=True)]
            yield self._logprobs(logits_MV, targets_M), columns[0], columns[1], columns[2]
        self.padding_share = 1 - used / positions


def _columns(scored: ScoredGroup, groups: Sequence[ScoredGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """Behaviour log-probs, advantages and weights of a group's tokens: the mean over sequences of their means."""
    rollouts = scored.group.rollouts
    lengths = torch.tensor([len(rollout.token_ids_T) for rollout in rollouts])
    num_rollouts = sum(len(other.group.rollouts) for other in groups)
    advantages_G = torch.from_numpy(np.asarray(group_advantages(scored.rewards_G, normalise="std"), np.float32))
    behaviour_M = torch.from_numpy(np.concatenate([rollout.logprobs_T for rollout in rollouts]))
    weights_G = 1.0 / (num_rollouts * lengths)
    return behaviour_M, advantages_G.repeat_interleave(lengths), weights_G.repeat_interleave(lengths)


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, repetitions: int, load: Load) -> Findings:
    """Peak memory and seconds of log-probs with their gradients over a vocabulary of real size."""
    policy = str(folder / "vocabulary")
    write_random_policy(load.vocabulary_shape, policy, tokenizer="toy")
    ways = {name: partial(_in_process, policy, name, load) for name in ("branch_logprobs", "whole logits")}
    found = interleaved(ways, repetitions)
    ours, whole = (turns[0] for turns in found.values())
    apart = {name: _apart(ours[name], whole[name], 0.0) for name in ("logprob", "gradient")}
    if max(apart.values()) > AGREEMENT:
        raise RuntimeError(f"log-probs or gradients of both ways differ: {ours}, {whole}")
    peaks = {name: [turn["peak_gib"] for turn in turns] for name, turns in found.items()}
    figures = {
        "vocabulary": load.vocabulary_shape.vocabulary,
        "logprob_tokens": int(ours["tokens"]),
        "one_float32_logits_tensor_gib": ours["tokens"] * load.vocabulary_shape.vocabulary * 4 / 2**30,
        "logprob_peak_gib": {name: spread(values) for name, values in peaks.items()},
        "logprob_s": {name: spread([turn["seconds"] for turn in turns]) for name, turns in found.items()},
        "logprob_apart": apart,
    }
    return Findings(
        [Goal("peak memory of log-probs, of whole logits", share(*peaks.values()), MEMORY_SHARE, at_least=False)],
        figures,
    )


def _in_process(policy: str, way: str, load: Load) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        turn = pool.apply(logprob_turn, (policy, way, load))
    log.info("bench learner: %s, peak %.2f GiB, %.2f s", way, turn["peak_gib"], turn["seconds"])
    return turn


def logprob_turn(policy: str, way: str, load: Load) -> dict[str, float]:
    """Log-probs of one group's completions, and the gradients of their sum, in a fresh process."""
    torch.set_num_threads(load.threads)
    mean_tokens = max(load.vocabulary_tokens // load.group_size, 1)
    [scored] = make_groups(policy, Load(groups=1, group_size=load.group_size, fixed_tokens=mean_tokens))
    processor, model = PolicyProcessor(policy), load_policy(policy).train()
    batch = collate([_branched(processor, scored.group)], model, processor.pad_token_id)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, does not count; Linux only
    started_s = time.perf_counter()
    if way == "branch_logprobs":
        logprobs_M, _ = branch_logprobs(model, batch)
    else:
        logits = model.lm_head(hidden_states(model, batch)).float()
        logits[..., model.config.image_token_id] = -1e9
        every = torch.log_softmax(logits, dim=-1).flatten(0, 1)
        logprobs_M = every[batch.state_at_M].gather(-1, batch.input_ids.flatten()[batch.target_at_M][:, None])[:, 0]
    logprobs_M.sum().backward()
    return {
        "seconds": time.perf_counter() - started_s,
        "peak_gib": (_peak_bytes() - before) / 2**30,
        "tokens": float(len(logprobs_M)),
        "logprob": float(logprobs_M.detach().mean()),
        "gradient": float(nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])),
    }


def _peak_bytes() -> int:
    """Most resident memory of this process since the peak was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# --- the load ---------------------------------------------------------------------------------------------------------


def make_groups(policy: str, load: Load) -> list[ScoredGroup]:
    """Groups of random tokens in long-tailed lengths, the same for the same load."""
    processor = PolicyProcessor(policy)
    rng = np.random.default_rng(0)
    groups = []
    for number in range(load.groups):
        images = tuple(_image(rng) for _ in range(2))
        prompt = processor.encode_prompt(f"What is number {number}?", images, PromptConfig())
        lengths_G = rng.lognormal(np.log(load.median_tokens), 0.8, load.group_size)
        lengths_G = lengths_G.clip(4, load.max_tokens).astype(int)
        if load.fixed_tokens:
            lengths_G[:] = load.fixed_tokens
        rollouts = tuple(
            Rollout(
                token_ids_T=rng.integers(20, 500, length).astype(np.int32),
                logprobs_T=rng.normal(-6.4, 0.3, length).clip(max=0).astype(np.float32),
                version_spans=((0, int(length)),),
                finish_reason="length",
                text="",
            )
            for length in lengths_G
        )
        group = RolloutGroup(
            ticket_id=f"bench-{number}",
            sample_id=f"bench-{number}",
            prompt_token_ids_P=np.asarray(prompt.token_ids_P, dtype=np.int32),
            images=images,
            image_grid_thw=prompt.image_grid_thw,
            rollouts=rollouts,
        )
        groups.append(ScoredGroup(group, rng.uniform(0, 4, load.group_size).astype(np.float32), {}))
    return groups


def _image(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _branched(processor: PolicyProcessor, group: RolloutGroup) -> BranchedSequence:
    return BranchedSequence(
        prefix_ids=group.prompt_token_ids_P,
        branches=[rollout.token_ids_T for rollout in group.rollouts],
        pixel_values=processor.image_features(group.images)["pixel_values"],
        image_grid_thw=group.image_grid_thw,
    )
