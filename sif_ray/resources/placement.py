"""Which actor of a GRPO run gets which share of which machine. Pure: Ray sees the result as bundles.

    split        node 0: [learner 0][learner 1][engine 0][engine 1]   one bundle per actor, an engine's GPUs in one
    colocated    node 0: [learner 0 + engine 0][learner 1 + engine 1] one bundle per GPU

Bundles of one node stay together (STRICT_PACK), so that the ranks of a learner are neighbours and an engine never
spans two machines. Without GPUs there is nothing to keep together, and Ray packs the bundles as they fit. Reward
workers run on the machines that learner and engines leave empty, or else beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sif_ray.config import ConfigError, GrpoConfig

REWARD_CPUS = 1.0  # logical, per reward worker
ROLE_LABEL = "sif.role"  # of a Ray node that is meant for one role of a layout
_ROLES = {"learner": "learner", "engine": "rollout", "reward": "judge"}


@dataclass(frozen=True)
class Seat:
    """What one actor takes of its bundle.

    Example: `Seat("engine 0", num_cpus=1.0, num_gpus=2.0)`.
    """

    actor: str  # "learner 0", "engine 0", "reward 0": the lanes of the timeline
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Bundle:
    """Resources that are given together, on one machine, and the actors that share them."""

    seats: tuple[Seat, ...]

    @property
    def num_cpus(self) -> float:
        return sum(seat.num_cpus for seat in self.seats)

    @property
    def num_gpus(self) -> float:
        """Whole GPUs: actors that share one do not leave a part of it to others."""
        asked = sum(seat.num_gpus for seat in self.seats)
        return float(-(-asked // 1))


@dataclass(frozen=True)
class Layout:
    """The bundles of every machine."""

    nodes: tuple[tuple[Bundle, ...], ...]
    strategy: str  # of Ray's placement groups, one per machine: "STRICT_PACK" or, without GPUs, "PACK"

    @property
    def bundles(self) -> Iterator[Bundle]:
        return (bundle for node in self.nodes for bundle in node)

    @property
    def roles(self) -> tuple[str, ...]:
        """What each machine is for: "learner", "rollout", "learner-rollout", or "judge" where only reward workers run.

        Machines of one role are equal: a second size gets the role "rollout-2", so that a smaller share of the run
        never takes the machine of a larger one.
        """
        sizes: dict[str, list[tuple[float, float]]] = {}
        return tuple(_role(node, sizes) for node in self.nodes)


def _role(node: tuple[Bundle, ...], sizes: dict[str, list[tuple[float, float]]]) -> str:
    kinds = {seat.actor.split()[0] for bundle in node for seat in bundle.seats}
    main = kinds - {"reward"} or kinds
    role = "-".join(name for kind, name in _ROLES.items() if kind in main)
    size = (sum(bundle.num_cpus for bundle in node), sum(bundle.num_gpus for bundle in node))
    known = sizes.setdefault(role, [])
    if size not in known:
        known.append(size)
    number = known.index(size) + 1
    return role if number == 1 else f"{role}-{number}"


def lay_out(config: GrpoConfig) -> Layout:
    """Learner ranks first, then engines, each on the first machine with room for it; reward workers in turn.

    Raises `ConfigError` for a layout that no such machines can hold.
    """
    placement = config.placement
    _refuse_wrong_shares(config)
    nodes: list[list[Bundle]] = [[] for _ in range(placement.nodes if placement.gpus_per_node else 1)]
    for bundle in _gpu_bundles(config):
        free = [node for node in nodes if _gpus(node) + bundle.num_gpus <= placement.gpus_per_node]
        if not free:
            raise ConfigError(_too_many(config, bundle))
        free[0].append(bundle)
    homes = [node for node in nodes if not node] or nodes
    for index in range(config.num_reward_workers):
        homes[index % len(homes)].append(Bundle((Seat(f"reward {index}", REWARD_CPUS, 0.0),)))
    strategy = "STRICT_PACK" if placement.gpus_per_node else "PACK"
    return Layout(tuple(tuple(node) for node in nodes if node), strategy)


def _gpu_bundles(config: GrpoConfig) -> list[Bundle]:
    learner, engine = config.learner, config.engine
    ranks = [
        Seat(f"learner {rank}", learner.num_cpus_per_rank, learner.num_gpus_per_rank)
        for rank in range(learner.num_ranks)
    ]
    engines = [Seat(f"engine {index}", engine.num_cpus, engine.num_gpus) for index in range(config.num_engines)]
    if config.placement.colocate:
        return [Bundle(pair) for pair in zip(ranks, engines, strict=True)]
    return [Bundle((seat,)) for seat in (*ranks, *engines)]


def _gpus(node: list[Bundle]) -> float:
    return sum(bundle.num_gpus for bundle in node)


# --- refusals --------------------------------------------------------------------------------------------------------


def _refuse_wrong_shares(config: GrpoConfig) -> None:
    for complaint in (*_colocation_complaints(config), *_gpu_complaints(config)):
        raise ConfigError(complaint)


def _colocation_complaints(config: GrpoConfig) -> Iterator[str]:
    learner, engine = config.learner, config.engine
    if not config.placement.colocate:
        return
    if config.num_engines != learner.num_ranks:
        yield (
            f"placement.colocate puts one engine beside every learner rank, but num_engines = {config.num_engines} and "
            f"learner.num_ranks = {learner.num_ranks}; make them equal"
        )
    if engine.tensor_parallel_size > 1:
        yield (
            f"engine.tensor_parallel_size = {engine.tensor_parallel_size}: a colocated engine has a part of one GPU; "
            "set it to 1, or placement.colocate to false"
        )
    if learner.num_gpus_per_rank + engine.num_gpus > 1:
        yield (
            f"learner.num_gpus_per_rank ({learner.num_gpus_per_rank:g}) + engine.num_gpus ({engine.num_gpus:g}) exceed "
            "the one GPU they share; set e.g. 0.5 and 0.5"
        )


def _gpu_complaints(config: GrpoConfig) -> Iterator[str]:
    learner, engine, placement = config.learner, config.engine, config.placement
    asked = {"learner.num_gpus_per_rank": learner.num_gpus_per_rank, "engine.num_gpus": engine.num_gpus}
    if not placement.gpus_per_node:
        for key, gpus in asked.items():
            if gpus:
                yield f"{key} = {gpus:g}, but placement.gpus_per_node = 0; set it to the GPUs of one machine"
        return
    for key, gpus in asked.items():
        if not gpus:
            yield f"{key} = 0 on machines with GPUs, where learner and engines must be on GPUs; set it to 1 or more"
    if engine.tensor_parallel_size > placement.gpus_per_node:
        yield (
            f"engine.tensor_parallel_size = {engine.tensor_parallel_size} exceeds placement.gpus_per_node = "
            f"{placement.gpus_per_node}: an engine stays on one machine; lower it"
        )
    if placement.colocate:
        return
    if learner.num_gpus_per_rank != 1:
        yield (
            f"learner.num_gpus_per_rank = {learner.num_gpus_per_rank:g}: a rank computes on one GPU; set it to 1, or "
            "placement.colocate to true for fractions"
        )
    if engine.num_gpus != engine.tensor_parallel_size:
        yield (
            f"engine.num_gpus ({engine.num_gpus:g}) is not engine.tensor_parallel_size "
            f"({engine.tensor_parallel_size}), the number of GPUs an engine computes on; make them equal"
        )


def _too_many(config: GrpoConfig, bundle: Bundle) -> str:
    learner, engine, placement = config.learner, config.engine, config.placement
    needed = sum(bundle.num_gpus for bundle in _gpu_bundles(config))
    parts = (
        f"{learner.num_ranks} shared by learner ranks and engines"
        if placement.colocate
        else f"{learner.num_ranks} learner ranks + {config.num_engines} engines x {engine.num_gpus:g}"
    )
    return (
        f"{needed:g} GPUs ({parts}) do not fit into placement.nodes x placement.gpus_per_node = {placement.nodes} x "
        f"{placement.gpus_per_node}: no machine has room for {bundle.seats[-1].actor}; lower learner.num_ranks or "
        "num_engines, or add machines"
    )
