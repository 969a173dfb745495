"""Questions to answers, on Ray Data. Every policy has a branch of its own, and the branches run side by side:

    tasks ─► questions ─────────► depth ──────────────► answers ─────────────────────────► driver
             (streams with their  (actor pool, only     (actor pool: an engine, a model or  (writes them as they come)
             photos)              where it is missing)  an endpoint; many calls each)

A row of the pipeline is a batch of `BATCH` questions or answers, and a block of its own: it is written once it is done.
Ray Data holds back whatever is faster than the answers, so that few images are under way. An actor that dies is
replaced and its questions are asked again.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from sif_ray.config import ConfigError, EvaluateConfig
from sif_ray.datagen.pictures import decode
from sif_ray.depth.encoding import coloured
from sif_ray.evaluate.answerer import make_answerer
from sif_ray.evaluate.question import ANSWER_SCHEMA, QUESTION_SCHEMA, Answer, Key, Question, pack, unpack
from sif_ray.evaluate.task import Task

BATCH = 8  # questions that travel together, and whose answers come back together: what a crash costs, per call
NO_PROGRESS_S = 3600.0  # without a finished batch after which Ray Data gives up, beyond an endpoint's own patience


def answers(
    todo: Mapping[str, Sequence[Key]], tasks: Sequence[Task], config: EvaluateConfig
) -> Iterator[tuple[str, Answer]]:
    """(policy, answer) of every wanted key by policy, as they come. Needs a Ray session.

    Policies beyond those for which the cluster has room come after the others. Raises the first error of any step, as
    `ray.exceptions.RayTaskError`.
    """
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # byte: Ray Data would collect rows until a block is worth its while
    patience_s = max((endpoint.max_wait_s for endpoint in config.endpoints.values()), default=0.0)
    context.execution_no_progress_timeout_s = NO_PROGRESS_S + patience_s
    names = [name for name in todo if todo[name]]
    together = policies_at_once(tasks, config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    for start in range(0, len(names), together):
        with ray.data.DataContext.current(context):
            branches = [_branch(name, set(todo[name]), tasks, config) for name in names[start : start + together]]
            found = branches[0].union(*branches[1:]) if len(branches) > 1 else branches[0]
        for row in found.iter_rows():
            yield from ((row["policy"], Answer(**answer)) for answer in row["batch"])


def policies_at_once(tasks: Sequence[Task], config: EvaluateConfig, cluster: Mapping[str, float]) -> int:
    """How many policies have room for their smallest pools side by side.

    On a cluster that is joined it is at least one, as it may grow; raises `ConfigError` where a local one is too small.
    """
    pools = [(config.actors_min, _resources(config.engine.num_cpus, config.engine.num_gpus))]
    if any(task.estimates_depth for task in tasks):
        pools.append((config.depth_actors_min, _resources(config.depth_num_cpus, config.depth_num_gpus)))
    asked = {
        name: sum(count * resources.get(key, 0.0) for count, resources in pools)
        for name, key in (("CPU", "num_cpus"), ("GPU", "num_gpus"))
    }
    room = min(int(cluster.get(name, 0.0) / amount) for name, amount in asked.items() if amount)
    if not room and config.ray.local:
        raise ConfigError(
            f"a policy needs {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs at once, and there are "
            f"{cluster.get('CPU', 0):g} and {cluster.get('GPU', 0):g}: lower engine.num_cpus, engine.num_gpus, "
            "actors_min or, for benchmarks, depth_num_cpus, depth_num_gpus, depth_actors_min; or raise ray.num_cpus"
        )
    return max(1, room)


def _branch(name: str, wanted: set[Key], tasks: Sequence[Task], config: EvaluateConfig) -> Any:
    import ray.data
    from ray.data import ActorPoolStrategy

    pipeline: Any = ray.data.from_items([name]).map_batches(
        _questions,  # type: ignore[arg-type]  # Ray's type leaves out functions with further arguments
        fn_kwargs={"tasks": list(tasks), "wanted": wanted},
        batch_format="pyarrow",
        num_cpus=0,  # it must not wait for a CPU that an engine holds
    )
    if any(task.estimates_depth for task in tasks):
        pipeline = pipeline.map_batches(
            _Depth,
            fn_constructor_kwargs={"config": config},
            compute=ActorPoolStrategy(min_size=config.depth_actors_min, max_size=config.depth_actors_max),
            batch_format="pyarrow",
            batch_size=1,
            **_resources(config.depth_num_cpus, config.depth_num_gpus),
        )
    is_endpoint = name in config.endpoints
    in_flight = config.endpoints[name].max_concurrency if is_endpoint else 2 * config.engine.max_num_seqs
    return pipeline.map_batches(
        _Answers,
        fn_constructor_kwargs={"name": name, "config": config},
        compute=ActorPoolStrategy(
            min_size=config.actors_min,
            max_size=config.actors_max,
            max_concurrent_calls_per_actor=math.ceil(in_flight / BATCH) + 1,  # one more covers for a last reply
        ),
        batch_format="pyarrow",
        batch_size=1,
        **({"num_cpus": 0.1} if is_endpoint else _resources(config.engine.num_cpus, config.engine.num_gpus)),
    )


def _resources(num_cpus: float, num_gpus: float) -> dict[str, Any]:
    return {"num_gpus": num_gpus} if num_gpus > 0 else {"num_cpus": num_cpus}  # Ray Data advises against both


# --- the steps -------------------------------------------------------------------------------------------------------


def _questions(table: pa.Table, tasks: Sequence[Task], wanted: set[Key]) -> Iterator[pa.Table]:
    for task in tasks:
        of_task = {key for key in wanted if key.task == task.name}
        questions = task.questions(of_task) if of_task else iter(())
        while some := list(itertools.islice(questions, BATCH)):
            yield pack(some, QUESTION_SCHEMA)


class _Depth:
    def __init__(self, config: EvaluateConfig) -> None:
        from sif_ray.depth.known import KnownDepth

        self._prompt = config.prompt
        self._depth = KnownDepth(config)

    def __call__(self, table: pa.Table) -> pa.Table:
        questions = unpack(table)
        lacking = [asked for asked in questions if self._lacks_depth(asked)]
        grays = self._depth.grays((_content_of(asked), decode(asked.photo)) for asked in lacking)
        shown = [
            replace(asked, depth_image=coloured(grays[_content_of(asked)])) if self._lacks_depth(asked) else asked
            for asked in questions
        ]
        return pack(shown, QUESTION_SCHEMA)

    def _lacks_depth(self, asked: Question) -> bool:
        return asked.shows_depth(self._prompt) and not (asked.depth_image or asked.refusal)


def _content_of(asked: Question) -> str:
    return hashlib.sha256(asked.photo).hexdigest()


class _Answers:
    def __init__(self, name: str, config: EvaluateConfig) -> None:
        self._name = name
        self._answerer = make_answerer(name, config)
        gc.freeze()  # or every full collection looks through all that was imported, and holds up the replies

    async def __call__(self, table: pa.Table) -> pa.Table:
        found = pack(await asyncio.gather(*map(self._answer, unpack(table))), ANSWER_SCHEMA)
        return found.append_column("policy", pa.array([self._name]))

    async def _answer(self, asked: Question) -> Answer:
        return Answer(*asked.key, refusal=asked.refusal) if asked.refusal else await self._answerer.answer(asked)
