"""What is simulated: a run's sizes, how long everything takes, and what fails. Times in seconds."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sif_ray.loop.requests import groups_per_engine


@dataclass(frozen=True)
class Lengths:
    """Tokens of a completion: log-normal around `mean`, or drawn from the groups of a run; `max_tokens` at most.

    Example: `Lengths(mean=400.0, max_tokens=2048).sample(rng, num_groups=2, group_size=8)`.
    """

    mean: float  # before the cap
    max_tokens: int
    cv: float = 0.6  # standard deviation / mean; 0 = every completion has `mean` tokens
    measured: tuple[tuple[int, ...], ...] = ()  # per group of a run; whole groups are drawn, as lengths go by prompt

    def sample(self, rng: np.random.Generator, num_groups: int, group_size: int) -> list[list[int]]:
        """[group][rollout], each at least 1."""
        if self.measured:
            chosen = [self.measured[index] for index in rng.integers(len(self.measured), size=num_groups)]
            return [list(group) if len(group) == group_size else _resized(group, group_size, rng) for group in chosen]
        shape = (num_groups, group_size)
        if self.cv == 0:
            tokens = np.full(shape, self.mean)
        else:
            variance = math.log(1 + self.cv**2)
            tokens = rng.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), shape)
        sampled: list[list[int]] = np.clip(np.rint(tokens), 1, self.max_tokens).astype(int).tolist()
        return sampled


def _resized(group: Sequence[int], size: int, rng: np.random.Generator) -> list[int]:
    drawn: list[int] = rng.choice(np.asarray(group), size).tolist()
    return drawn


@dataclass(frozen=True)
class LearnerRates:
    """A training step: its rank with the most work takes `token_s` for a token and `group_s` for a group, unless the
    weights that every micro-batch gathers take longer.

    Example: `LearnerRates(step_s=0.5, token_s=1e-4).seconds([900, 700, 800], num_ranks=2)`.
    """

    step_s: float  # optimiser and all that does not depend on the batch
    token_s: float  # passes over one token of a packed group, prompt counted once
    group_s: float = 0.0  # images of one group
    gather_s: float = 0.0  # weights gathered and gradients reduced for one micro-batch (ZeRO-3)
    micro_batch_tokens: int = 0  # 0 = a step is one micro-batch

    def seconds(self, tokens_of_groups: Sequence[int], num_ranks: int) -> float:
        """The step, spread over the ranks as the learner does it: largest group first, to the rank with the least."""
        ranks = min(num_ranks, len(tokens_of_groups))
        if ranks == 1:
            tokens, groups = sum(tokens_of_groups), len(tokens_of_groups)
        else:
            loads = [(0, 0)] * ranks
            for count in sorted(tokens_of_groups, reverse=True):
                held, number = loads[0]
                heapq.heapreplace(loads, (held + count, number + 1))
            tokens, groups = max(loads)
        passes = -(-tokens // self.micro_batch_tokens) if self.micro_batch_tokens else 1
        return self.step_s + max(tokens * self.token_s + groups * self.group_s, passes * self.gather_s)


@dataclass(frozen=True)
class Rates:
    """How long everything takes.

    `decode_step_s[n]` is one token for each of n sequences that an engine writes at once; [0] is not used.
    """

    decode_step_s: tuple[float, ...]
    learner: LearnerRates
    prefill_s: float = 0.0  # of one prompt; the engine writes nothing meanwhile
    request_s: float = 0.0  # from a lease to the first token and from the last token to the group, beside `prefill_s`
    score_s: float = 0.0  # of a group by a reward worker, one group after the other
    judge_latency_s: float = 0.0  # mean of one call of the judge; 0 = there is no call
    judge_latency_cv: float = 0.5  # standard deviation / mean, log-normal
    publish_s: float = 0.0  # the learner hands new weights over
    transfer_s: float = 0.0  # they come to an engine, which goes on generating
    transfer_in_turn: bool = False  # the engines get them one after the other
    pause_s: float = 0.0  # the engine loads them and stands still
    checkpoint_s: float = 0.0
    engine_start_s: float = 0.0
    learner_start_s: float = 0.0
    decode_slowdown: float = 1.0  # factor on decode steps while the learner trains (cores or GPUs in common)


@dataclass(frozen=True)
class Failures:
    """What breaks, at exponentially distributed intervals. 0 = never."""

    gpu_mtbf_h: float = 0.0  # mean time between failures of one GPU; an engine or the learner goes with it
    judge_outage_every_h: float = 0.0
    judge_outage_s: float = 60.0


@dataclass(frozen=True)
class Scenario:
    """One simulated run of `num_steps` training steps."""

    num_steps: int
    groups_per_step: int
    group_size: int
    max_staleness: int
    num_engines: int
    gpus_per_engine: int
    max_num_seqs: int  # sequences that an engine writes at once
    learner_ranks: int  # one GPU each
    lengths: Lengths
    prompt_tokens: int
    rates: Rates
    num_reward_workers: int = 1
    judge_calls: int = 32  # in flight, over all reward workers
    lease_timeout_s: float = 300.0
    checkpoint_every: int = 20
    failures: Failures = field(default_factory=Failures)
    seed: int = 0

    @property
    def num_gpus(self) -> int:
        return self.num_engines * self.gpus_per_engine + self.learner_ranks

    @property
    def groups_per_engine(self) -> int:
        """Leases that an engine may hold."""
        return groups_per_engine(self.max_num_seqs, self.group_size)
