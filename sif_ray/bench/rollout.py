"""The suite `rollout`: tokens per second of the loop's rollout actors, beside vLLM's own `LLM.generate`.

The same groups, G completions of a prompt with photograph and depth picture, are asked of a rollout actor as the loop
asks it (`groups_per_engine` at a time, over Ray) and of `LLM.generate` (all at once, in a process of its own, tokenised
and decoded before the clock starts), in turns, each with photographs that no engine has seen; whose turn it is not,
waits. Both have the arguments of the actor's engine. "llm_own_executor", where vLLM chooses the executor, comes after
them, since its worker spins while it waits. Tokens are drawn evenly from the vocabulary by seeds, so that all ways must
write the same ones, which is checked.

Reuse within a group is what the engine says of itself with the receipt of a weight update after every turn: prompt
tokens that no cache held, and images that were encoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sif_ray.bench.findings import Findings, Goal, interleaved, share, spread
from sif_ray.bench.serve import write_babbling_policy
from sif_ray.bench.toy_dataset import toy_samples
from sif_ray.config import EngineConfig, GrpoConfig, SamplingConfig
from sif_ray.loop.requests import groups_per_engine, training_request
from sif_ray.loop.workers import ActorFactory
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.shards import StoredWeights
from sif_ray.records import RolloutGroup
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import engine_request
from sif_ray.rollout.environment import engine_environment, environment
from sif_ray.rollout.request import RolloutRequest
from sif_ray.rollout.weights import Receipt, make_update
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

SHARE_OF_LLM = 0.95
ONCE = 1.0
SAME_PRIORITY = {"RAY_worker_niceness": "0"}  # as the other way's: on a machine that is not idle it would decide
WARM_UP = 4  # groups before the clock starts, of other samples


@dataclass(frozen=True)
class Load:
    """How much work is a turn."""

    groups: int = 64  # a quarter of a minute
    group_size: int = 8
    max_tokens: int = 128
    max_num_seqs: int = 64


@dataclass(frozen=True)
class Turn:
    """What one way has done with all groups of a turn."""

    seconds: float
    num_tokens: int
    digest: str  # of all tokens, in order
    receipt: Receipt | None = None  # of an update after the groups

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


Way = Callable[[Sequence[RolloutRequest]], Turn]


def measure(
    repetitions: int, load: Load = Load(), share_of_llm: float = SHARE_OF_LLM, own_executor: bool = True
) -> Findings:
    """Throughput of the three ways, two without `own_executor`, and reuse within groups."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        config = config_of(write_babbling_policy(Path(name) / "policy"), load)
        samples = toy_samples(WARM_UP + repetitions * load.groups)
        requests = [training_request(config, sample, sample.sample_id) for sample in samples]
        first, others = requests[:WARM_UP], requests[WARM_UP:]
        turns = [others[start : start + load.groups] for start in range(0, len(others), load.groups)]
        with by_llm(config) as llm, by_actors(config) as actors:  # both start at once
            found = _take_turns({"actors": actors, "llm": llm}, first, turns)
        if own_executor:
            with by_llm(config, own_executor=True) as llm:
                found |= _take_turns({"llm_own_executor": llm}, first, turns)
        reuse = [_reuse(config, asked, turn.receipt) for asked, turn in zip(turns, found["actors"], strict=True)]
    _check_equal(found)
    rates = {way: [turn.tokens_per_s for turn in done] for way, done in found.items()}
    shares = {way: share(rates["actors"], theirs) for way, theirs in rates.items() if way != "actors"}
    times = {what: statistics.median(found[what] for found in reuse) for what in reuse[0]}
    goals = [
        Goal("tokens/s of rollout actors, of LLM.generate's", shares["llm"], share_of_llm, at_least=True),
        Goal("times that the whole blocks of a prompt are computed per group", times["whole_blocks"], ONCE, False),
        Goal("times that an image is encoded per group", times["images"], ONCE, at_least=False),
    ]
    figures = {
        "load": asdict(load),
        "tokens": [turn.num_tokens for turn in found["actors"]],
        "tokens_per_s": {way: spread(values) for way, values in rates.items()},
        "share_of": shares,
        "times_per_group": times,
    }
    return Findings(goals, figures)


def quick() -> Findings:
    """A small load against loose bounds."""
    return measure(3, Load(groups=16, max_tokens=64), share_of_llm=0.7, own_executor=False)


def config_of(policy: str, load: Load) -> GrpoConfig:
    """One engine on one thread."""
    return GrpoConfig(
        policy=policy,
        group_size=load.group_size,
        sampling=SamplingConfig(max_tokens=load.max_tokens),
        engine=EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5),
    )


def _take_turns(
    ways: Mapping[str, Way], first: Sequence[RolloutRequest], turns: Sequence[Sequence[RolloutRequest]]
) -> dict[str, list[Turn]]:
    """Every way with the `first` requests, which do not count, and then with each of the turns."""
    for way in ways.values():
        way(first)
    return interleaved({name: _each(way, turns, name) for name, way in ways.items()}, len(turns))


def _each(way: Way, turns: Sequence[Sequence[RolloutRequest]], name: str) -> Callable[[], Turn]:
    """Works that take the turns one after the other."""
    waiting = iter(turns)

    def work() -> Turn:
        done = way(next(waiting))
        log.info("bench rollout: %s, %.0f tokens/s (%d tokens)", name, done.tokens_per_s, done.num_tokens)
        return done

    return work


# --- the ways --------------------------------------------------------------------------------------------------------


@contextmanager
def by_actors(config: GrpoConfig) -> Iterator[Way]:
    """Through an actor that is kept as full as the loop keeps it."""
    import ray

    def make(name: str) -> Any:
        options = {"num_cpus": config.engine.num_cpus, "num_gpus": config.engine.num_gpus}
        return RolloutActor.options(**options).remote(
            config.policy, config.engine, config.prompt, seed=config.seed, engine_id=name
        )

    stored = StoredWeights(config.policy)
    weights = [(name, stored[name]) for name in stored.shapes]
    versions = itertools.count(1)

    async def turn(actor: Any, requests: Sequence[RolloutRequest]) -> Turn:
        started_s = time.perf_counter()
        groups = await generate(actor, requests, groups_per_engine(config.engine.max_num_seqs, config.group_size))
        seconds = time.perf_counter() - started_s
        by_ticket = {group.ticket_id: group for group in groups}
        tokens = [rollout.token_ids_T for request in requests for rollout in by_ticket[request.ticket_id].rollouts]
        receipt = await actor.update_weights(make_update(next(versions), [weights], put=ray.put))
        return Turn(seconds, sum(map(len, tokens)), _digest(tokens), receipt)

    with environment(SAME_PRIORITY), ray_session(config.ray), asyncio.Runner() as runner:
        factory = ActorFactory(make, start="start", shutdown="shutdown")
        actor = runner.run(factory.start("engine 0"))
        try:
            yield lambda requests: runner.run(turn(actor, requests))
        finally:
            runner.run(factory.end(actor))


async def generate(actor: Any, requests: Iterable[RolloutRequest], at_once: int) -> list[RolloutGroup]:
    """The groups of an actor that is asked for so many at a time, as they come."""
    waiting, groups = iter(requests), []

    async def work() -> None:
        for request in waiting:
            groups.append(await actor.generate(request))

    await asyncio.gather(*(work() for _ in range(at_once)))
    return groups


@contextmanager
def by_llm(config: GrpoConfig, own_executor: bool = False) -> Iterator[Way]:
    """By `LLM.generate` in a process of its own, whose start the first turn waits for."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        opened = process.submit(_LlmProcess.open, config, own_executor)

        def turn(requests: Sequence[RolloutRequest]) -> Turn:
            opened.result()
            return process.submit(_LlmProcess.turn, requests).result()

        try:
            yield turn
        finally:
            process.submit(_LlmProcess.close).result()


class _LlmProcess:
    """What the other process holds."""

    config: ClassVar[GrpoConfig]
    processor: ClassVar[PolicyProcessor]
    llm: ClassVar[Any] = None

    @classmethod
    def open(cls, config: GrpoConfig, own_executor: bool) -> None:
        with environment(engine_environment(config.engine)):
            from vllm import LLM

            from sif_ray.rollout.vllm_client import engine_arguments, on_cpu

            cls.config, cls.processor = config, PolicyProcessor(config.policy, config.max_pixels)
            arguments = engine_arguments(
                config.policy,
                config.engine,
                dtype="float32" if on_cpu() else "auto",
                image_size_limits=cls.processor.image_size_limits(),
                seed=config.seed,
            )
            cls.llm = LLM(**arguments | ({"distributed_executor_backend": None} if own_executor else {}))

    @classmethod
    def turn(cls, requests: Sequence[RolloutRequest]) -> Turn:
        asked = [
            engine_request(
                request,
                cls.processor.encode_prompt(request.question, request.images, cls.config.prompt),
                cls.processor,
                number,
            )
            for number, request in enumerate(requests)
        ]
        prompts = [request.prompt() for request in asked]
        params = [request.group_params(cls.config.group_size) for request in asked]
        started_s = time.perf_counter()
        outputs = cls.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started_s
        tokens = [np.asarray(item.token_ids, np.int32) for output in outputs for item in output.outputs]
        return Turn(seconds, sum(map(len, tokens)), _digest(tokens))

    @classmethod
    def close(cls) -> None:
        if cls.llm is not None:
            cls.llm.llm_engine.engine_core.shutdown()


# --- what they have done ---------------------------------------------------------------------------------------------


def _digest(tokens: Iterable[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for token_ids_T in tokens:
        digest.update(len(token_ids_T).to_bytes(4, "little") + np.ascontiguousarray(token_ids_T, np.int32).tobytes())
    return digest.hexdigest()


def _check_equal(found: Mapping[str, Sequence[Turn]]) -> None:
    for number, same in enumerate(zip(*found.values(), strict=True), 1):
        if len({turn.digest for turn in same}) > 1:
            counts = dict(zip(found, (turn.num_tokens for turn in same), strict=True))
            raise RuntimeError(f"turn {number}: the ways wrote different tokens, in number {counts}")


def _reuse(config: GrpoConfig, requests: Sequence[RolloutRequest], receipt: Receipt | None) -> dict[str, float]:
    """How many times per group: all of a prompt is computed, its whole cache blocks are, its images are encoded.

    What is left of a prompt behind its last whole block, at least a token, is computed for every rollout.
    """
    from sif_ray.rollout.vllm_client import CPU_BLOCK_TOKENS

    assert receipt is not None
    processor = PolicyProcessor(config.policy, config.max_pixels)
    lengths = [len(processor.encode_prompt(r.question, r.images, config.prompt).token_ids_P) for r in requests]
    in_blocks = sum((length - 1) // CPU_BLOCK_TOKENS * CPU_BLOCK_TOKENS for length in lengths)
    behind = config.group_size * (sum(lengths) - in_blocks)
    if receipt.prompt_tokens != config.group_size * sum(lengths):
        raise RuntimeError(f"the engine counts {receipt.prompt_tokens} prompt tokens, {sum(lengths)} for every rollout")
    return {
        "prompt": receipt.computed_prompt_tokens / sum(lengths),
        "whole_blocks": (receipt.computed_prompt_tokens - behind) / in_blocks,
        "images": receipt.encoded_images / sum(len(request.images) for request in requests),
    }
