"""The suite `rollout`: tokens per second of the loop's rollout actors, beside vLLM's own `LLM.generate`.

The same groups, G completions of a prompt with photograph and depth picture, are asked of a rollout actor as the loop
asks it (`groups_per_engine` at a time, over Ray) and of `LLM.generate` (all at once, in a process of its own, tokenised
and decoded before the clock starts), in turns; each turn starts an engine of its own, so that nothing is known from
before and only one is there. Engine arguments are those of the actor's engine; "llm_own_executor" leaves the choice of
the executor to vLLM. Tokens are drawn evenly from the vocabulary by seeds, so that all ways must write the same ones,
which is checked.

Reuse within a group is what the engine says of itself with the receipt of a weight update after the groups: prompt
tokens that no cache held, and images that were encoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.bench.serve import write_babbling_policy
from sif_ray.bench.toy_dataset import toy_samples
from sif_ray.config import EngineConfig, GrpoConfig, SamplingConfig
from sif_ray.loop.requests import groups_per_engine, training_request
from sif_ray.loop.workers import ActorFactory
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.policy.shards import StoredWeights
from sif_ray.records import RolloutGroup
from sif_ray.rollout.actor import RolloutActor
from sif_ray.rollout.engine import RolloutRequest, engine_request
from sif_ray.rollout.environment import engine_environment, environment
from sif_ray.rollout.weights import Receipt, make_update
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

SHARE_OF_LLM = 0.95
ONCE = 1.0
WARM_UP = 4  # groups before the clock starts, of other samples; the receipt after them clears every cache


@dataclass(frozen=True)
class Load:
    """How much work."""

    groups: int = 96  # a quarter of a minute
    group_size: int = 8
    max_tokens: int = 128
    max_num_seqs: int = 64


@dataclass(frozen=True)
class Turn:
    """What one way has done with all groups."""

    seconds: float
    num_tokens: int
    digest: str  # of all tokens, in order
    receipt: Receipt | None = None  # of an update after the groups

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def measure(
    repetitions: int, load: Load = Load(), share_of_llm: float = SHARE_OF_LLM, own_executor: bool = True
) -> Findings:
    """Throughput of the three ways, two without `own_executor`, and reuse within groups."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        config = config_of(write_babbling_policy(Path(name) / "policy"), load)
        requests = requests_of(config, load.groups)
        ways = {
            "actors": partial(actor_turn, config, requests),
            "llm": partial(llm_turn, config, requests),
        }
        if own_executor:
            ways["llm_own_executor"] = partial(llm_turn, config, requests, own_executor=True)
        found = interleaved({way: partial(_told, way, turn) for way, turn in ways.items()}, repetitions)
        reuse = _reuse(config, requests, [turn.receipt for turn in found["actors"] if turn.receipt])
    _check_equal(found)
    rates = {way: [turn.tokens_per_s for turn in turns] for way, turns in found.items()}
    medians = {way: statistics.median(values) for way, values in rates.items()}
    goals = [
        Goal("tokens/s of rollout actors, of LLM.generate's", medians["actors"] / medians["llm"], share_of_llm, True),
        Goal("times that the whole blocks of a prompt are computed per group", reuse["whole_blocks"], ONCE, False),
        Goal("times that an image is encoded per group", reuse["images"], ONCE, False),
    ]
    figures = {
        "load": asdict(load),
        "tokens": found["actors"][0].num_tokens,
        "tokens_per_s": {way: spread(values) for way, values in rates.items()},
        "share_of": {way: medians["actors"] / rate for way, rate in medians.items() if way != "actors"},
        "times_per_group": reuse,
    }
    return Findings(goals, figures)


def quick() -> Findings:
    """A small load against loose bounds."""
    return measure(1, Load(groups=48, max_tokens=96), share_of_llm=0.75, own_executor=False)


def config_of(policy: str, load: Load) -> GrpoConfig:
    """One engine on one thread."""
    return GrpoConfig(
        policy=policy,
        group_size=load.group_size,
        sampling=SamplingConfig(max_tokens=load.max_tokens),
        engine=EngineConfig(max_model_len=512, max_num_seqs=load.max_num_seqs, kv_cache_gib=0.5),
    )


def requests_of(config: GrpoConfig, count: int) -> list[RolloutRequest]:
    """As the loop makes them, and `WARM_UP` more at the end."""
    return [training_request(config, sample, sample.sample_id) for sample in toy_samples(count + WARM_UP)]


# --- the ways --------------------------------------------------------------------------------------------------------


def actor_turn(config: GrpoConfig, requests: Sequence[RolloutRequest]) -> Turn:
    """Through `config.num_engines` actors, each kept as full as the loop keeps it."""
    import ray

    def make(name: str) -> Any:
        number = int(name.split()[-1])
        options = {"num_cpus": config.engine.num_cpus, "num_gpus": config.engine.num_gpus}
        return RolloutActor.options(**options).remote(
            config.policy, config.engine, config.prompt, seed=config.seed + number, engine_id=name
        )

    async def turn() -> Turn:
        factory = ActorFactory(make, start="start", shutdown="shutdown")
        stored = StoredWeights(config.policy)
        weights = [(name, stored[name]) for name in stored.shapes]
        actors = await asyncio.gather(*(factory.start(f"engine {number}") for number in range(config.num_engines)))
        try:
            await asyncio.gather(*(_generate(actor, requests[-WARM_UP:], WARM_UP) for actor in actors))
            first, second = (make_update(version, [weights], put=ray.put) for version in (1, 2))
            await asyncio.gather(*(actor.update_weights(first) for actor in actors))
            waiting = iter(requests[:-WARM_UP])
            started_s = time.perf_counter()
            shares = await asyncio.gather(*(_generate(actor, waiting, groups_per_engine(config)) for actor in actors))
            seconds = time.perf_counter() - started_s
            receipts = await asyncio.gather(*(actor.update_weights(second) for actor in actors))
        finally:
            await asyncio.gather(*(factory.end(actor) for actor in actors))
        groups = {group.ticket_id: group for share in shares for group in share}
        ordered = [groups[request.ticket_id] for request in requests[:-WARM_UP]]
        tokens = [rollout.token_ids_T for group in ordered for rollout in group.rollouts]
        return Turn(seconds, sum(map(len, tokens)), _digest(tokens), receipts[0])

    with ray_session(config.ray):
        return asyncio.run(turn())


async def _generate(actor: Any, requests: Iterable[RolloutRequest], at_once: int) -> list[RolloutGroup]:
    waiting, groups = iter(requests), []

    async def work() -> None:
        for request in waiting:
            groups.append(await actor.generate(request))

    await asyncio.gather(*(work() for _ in range(at_once)))
    return groups


def llm_turn(config: GrpoConfig, requests: Sequence[RolloutRequest], own_executor: bool = False) -> Turn:
    """By `LLM.generate` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_llm_turn, config, requests, own_executor).result()


def _llm_turn(config: GrpoConfig, requests: Sequence[RolloutRequest], own_executor: bool) -> Turn:
    with environment(engine_environment(config.engine)):
        from vllm import LLM

        from sif_ray.rollout.vllm_client import engine_arguments, on_cpu

        processor = PolicyProcessor(config.policy, config.max_pixels)
        arguments = engine_arguments(
            config.policy,
            config.engine,
            dtype="float32" if on_cpu() else "auto",
            image_size_limits=processor.image_size_limits(),
            seed=config.seed,
        )
        if own_executor:
            arguments["distributed_executor_backend"] = None
        llm = LLM(**arguments)
    asked = [
        engine_request(
            request, processor.encode_prompt(request.question, request.images, config.prompt), processor, number
        )
        for number, request in enumerate(requests)
    ]
    prompts = [request.prompt() for request in asked]
    params = [request.group_params(config.group_size) for request in asked]
    llm.generate(prompts[-WARM_UP:], params[-WARM_UP:], use_tqdm=False)
    llm.reset_prefix_cache()
    started_s = time.perf_counter()
    outputs = llm.generate(prompts[:-WARM_UP], params[:-WARM_UP], use_tqdm=False)
    seconds = time.perf_counter() - started_s
    tokens = [np.asarray(item.token_ids, np.int32) for output in outputs for item in output.outputs]
    llm.llm_engine.engine_core.shutdown()
    return Turn(seconds, sum(map(len, tokens)), _digest(tokens))


def _told(way: str, turn: partial[Turn]) -> Turn:
    done = turn()
    log.info("bench rollout: %s, %.0f tokens/s (%d tokens)", way, done.tokens_per_s, done.num_tokens)
    return done


# --- what they have done ---------------------------------------------------------------------------------------------


def _digest(tokens: Iterable[np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for token_ids_T in tokens:
        digest.update(len(token_ids_T).to_bytes(4, "little") + np.ascontiguousarray(token_ids_T, np.int32).tobytes())
    return digest.hexdigest()


def _check_equal(found: dict[str, list[Turn]]) -> None:
    digests = {turn.digest for turns in found.values() for turn in turns}
    if len(digests) > 1:
        counts = {way: [turn.num_tokens for turn in turns] for way, turns in found.items()}
        raise RuntimeError(f"the ways wrote different tokens, in number {counts}: they did not do the same work")


def _reuse(config: GrpoConfig, requests: Sequence[RolloutRequest], receipts: Sequence[Receipt]) -> dict[str, float]:
    """How many times per group: all of a prompt is computed, its whole cache blocks are, its images are encoded.

    What is left of a prompt behind its last whole block, at least a token, is computed for every rollout.
    """
    from sif_ray.rollout.vllm_client import CPU_BLOCK_TOKENS

    processor = PolicyProcessor(config.policy, config.max_pixels)
    measured = requests[:-WARM_UP]
    lengths = [len(processor.encode_prompt(r.question, r.images, config.prompt).token_ids_P) for r in measured]
    images = sum(len(request.images) for request in measured)
    in_blocks = sum((length - 1) // CPU_BLOCK_TOKENS * CPU_BLOCK_TOKENS for length in lengths)
    behind = config.group_size * (sum(lengths) - in_blocks)
    for receipt in receipts:
        if receipt.prompt_tokens != config.group_size * sum(lengths):
            raise RuntimeError(f"the engine counts {receipt.prompt_tokens} prompt tokens of {sum(lengths)} per rollout")
    computed = statistics.median(receipt.computed_prompt_tokens for receipt in receipts)
    encoded = statistics.median(receipt.encoded_images for receipt in receipts)
    return {
        "prompt": computed / sum(lengths),
        "whole_blocks": (computed - behind) / in_blocks,
        "images": encoded / images,
    }
