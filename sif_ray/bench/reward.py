"""The suite `reward`: what one core scores, and how the ledger bears many open tickets.

Traces are groups of rollouts as a policy in training writes them: the looks of forward frames, moved by chance, texts
of uneven length, some cut off at the token limit, some with an area that cannot be read. They are scored in turns by
the four terms of `method.rewards` alone and by the `Rewarder` that a reward worker holds, which also decodes the depth
image of every group, judges the answers (exact match, so that no model is measured) and adds the diagnostics. Both ways
must give the same rewards. Only this process's own processor time counts.

The ledger is filled with open tickets and then kept full while groups are generated, scored, trained and leased
again, each of these one transition.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.config import RewardConfig
from sif_ray.depth.encoding import depth_png
from sif_ray.judge.exact import ExactMatchJudge
from sif_ray.judge.scoring import read_depth
from sif_ray.loop.ledger import Lease, Ledger
from sif_ray.loop.rewarder import GroupScores, Rewarder
from sif_ray.method import rewards
from sif_ray.method.boxes import FULL_IMAGE, Box, as_box
from sif_ray.method.expansion import forward_frames
from sif_ray.method.trace import AreaBox, Step, Trace, find_answer
from sif_ray.records import Sample

log = logging.getLogger(__name__)

TRACES_PER_S = 3000.0
TRANSITIONS_PER_S = 20_000.0
FLATNESS = 0.7  # of the rate with the fewest open tickets, kept with the most

PROFILE = "corrected"
PREVIOUS = 0.25  # answer score of every sample one epoch ago
MAX_STALENESS = 4
WORDS = ("the", "left", "cup", "stands", "behind", "of", "bottle", "nearer", "depth", "is", "smaller", "table", "and")


@dataclass(frozen=True)
class Load:
    """How much work."""

    traces: int = 10_000
    group_size: int = 8
    width: int = 640  # px, of photograph and depth image
    height: int = 480
    open_tickets: tuple[int, ...] = (1_000, 10_000, 100_000)
    rounds: int = 2  # of the ledger with the most open tickets: each is trained so many times on average

    @property
    def groups(self) -> int:
        return self.traces // self.group_size


@dataclass(frozen=True)
class Group:
    """G texts that answer one sample."""

    sample: Sample
    texts_G: list[str]


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Rates of scoring and of the ledger."""
    traces, ledger = measure_traces(repetitions, load), measure_ledger(repetitions, load)
    return Findings(traces.goals + ledger.goals, {"traces": traces.figures, "ledger": ledger.figures})


def quick() -> Findings:
    """A small load against loose bounds, of ratios alone."""
    traces, ledger = (
        measure_traces(3, Load(traces=2_000)),
        measure_ledger(3, Load(open_tickets=(1_000, 20_000))),
    )
    terms, worker = (traces.figures["traces_per_s"][name]["median"] for name in ("terms", "worker"))
    goals = [
        Goal("rate of a reward worker, of the four terms alone", worker / terms, 0.25, at_least=True),
        Goal(ledger.goals[1].name, ledger.goals[1].value, 0.4, at_least=True),
    ]
    return Findings(goals, {"traces": traces.figures, "ledger": ledger.figures})


def measure_traces(repetitions: int, load: Load) -> Findings:
    """Traces per second of both ways."""
    groups = make_groups(load)
    ways = {"terms": partial(_timed_terms, groups), "worker": partial(_timed_worker, groups)}
    found = interleaved(ways, repetitions)
    rewards_N = {name: turns[0][0] for name, turns in found.items()}
    if not np.array_equal(rewards_N["terms"], rewards_N["worker"]):
        raise RuntimeError("the four terms and the reward worker disagree about the rewards of the same traces")
    rates = {name: [len(rewards_N[name]) / seconds for _, seconds in turns] for name, turns in found.items()}
    lengths = [len(text) for group in groups for text in group.texts_G]
    goals = [Goal("traces per second, four terms", statistics.median(rates["terms"]), TRACES_PER_S, at_least=True)]
    figures = {
        "load": asdict(load),
        "traces": len(lengths),
        "mean_reward": float(rewards_N["worker"].mean()),
        "characters": {"median": statistics.median(lengths), "max": max(lengths)},
        "boxes": sum(text.count("bbox_2d") for group in groups for text in group.texts_G),
        "traces_per_s": {name: spread(values) for name, values in rates.items()},
    }
    return Findings(goals, figures)


def measure_ledger(repetitions: int, load: Load) -> Findings:
    """Transitions per second by the number of open tickets, over as many transitions for each."""
    trained = load.rounds * max(load.open_tickets)
    found = interleaved({str(n): partial(ledger_rate, n, trained // n) for n in load.open_tickets}, repetitions)
    rates = {name: statistics.median(values) for name, values in found.items()}
    fewest, most = (str(pick(load.open_tickets)) for pick in (min, max))
    goals = [
        Goal(f"transitions per second, {most} open tickets", rates[most], TRANSITIONS_PER_S, at_least=True),
        Goal(f"rate of the ledger, {most} open tickets to {fewest}", rates[most] / rates[fewest], FLATNESS, True),
    ]
    return Findings(goals, {"transitions_per_s": {name: spread(values) for name, values in found.items()}})


# --- the two ways -----------------------------------------------------------------------------------------------------


def _timed_terms(groups: Sequence[Group]) -> tuple[npt.NDArray[np.float32], float]:
    """Rewards of all texts, and seconds; depth is decoded before the clock starts."""
    depths = [read_depth(group.sample.depth_image, PROFILE) for group in groups]
    judge = ExactMatchJudge()
    found = []
    seconds = 0.0
    for group, depth_HW in zip(groups, depths, strict=True):
        sample = group.sample
        answers = [find_answer(text) for text in group.texts_G]
        scores = [float(bool(a) and judge.same(sample.question, sample.answer, a or "")) for a in answers]
        started_s = time.process_time()
        for text, score in zip(group.texts_G, scores, strict=True):
            found.append(
                rewards.format_reward(text, PROFILE)
                + rewards.answer_reward(score, PREVIOUS)
                + rewards.box_reward(text, sample.boxes, PROFILE)
                + rewards.checked_depth_reward(text, depth_HW, PROFILE)
            )
        seconds += time.process_time() - started_s
    return np.array(found, np.float32), seconds


def _timed_worker(groups: Sequence[Group]) -> tuple[npt.NDArray[np.float32], float]:
    rewarder = Rewarder(RewardConfig(), PROFILE, ExactMatchJudge())

    async def score() -> list[GroupScores]:
        scored = [await rewarder.score(group.texts_G, group.sample, PREVIOUS) for group in groups]
        return [scores for scores in scored if isinstance(scores, GroupScores)]

    started_s = time.process_time()
    scored = asyncio.run(score())
    seconds = time.process_time() - started_s
    return np.concatenate([scores.rewards_G for scores in scored]), seconds


def ledger_rate(open_tickets: int, rounds: int) -> float:
    """Transitions per second of a ledger that holds `open_tickets` leased tickets.

    What is in memory from before is not looked at by the garbage collector meanwhile.
    """
    gc.collect()
    gc.freeze()
    try:
        return _ledger_rate(open_tickets, rounds)
    finally:
        gc.unfreeze()


def _ledger_rate(open_tickets: int, rounds: int) -> float:
    per_step = max(open_tickets // MAX_STALENESS, 1)
    steps = rounds * MAX_STALENESS
    ledger = Ledger(
        [f"sample-{number}" for number in range(open_tickets + steps * per_step)],
        epochs=1,
        groups_per_step=per_step,
        max_staleness=MAX_STALENESS,
        lease_timeout_s=3600.0,
        now_s=time.monotonic,
    )
    leases: deque[Lease] = deque()

    def fill() -> None:
        while len(leases) < open_tickets and (lease := ledger.lease(ledger.version)) is not None:
            leases.append(lease)

    fill()
    if len(leases) != open_tickets:
        raise RuntimeError(f"{len(leases)} of {open_tickets} tickets could be opened")
    started_s = time.process_time()
    for _ in range(steps):
        for lease in itertools.islice(leases, per_step):
            ledger.generated(lease, lease.version)
        for _ in range(per_step):
            ledger.scored(leases.popleft())
        batch = ledger.take_batch()
        if batch is None:
            raise RuntimeError("the ledger withholds a batch though all groups that are due are scored")
        ledger.trained(batch)
        ledger.expire()
        fill()
    seconds = time.process_time() - started_s
    counts = ledger.counts()
    if (counts["trained"], counts["leased"]) != (steps * per_step, open_tickets):
        raise RuntimeError(f"the ledger has lost tickets: {counts}")
    rate = 4 * steps * per_step / seconds
    log.info("bench reward: %d open tickets, %.0f transitions/s", open_tickets, rate)
    return rate


# --- the load ---------------------------------------------------------------------------------------------------------


def make_groups(load: Load) -> list[Group]:
    """Groups of texts, the same for the same load."""
    rng = random.Random(0)
    depths = [depth_png(_depth(load, number)) for number in range(16)]
    groups = []
    for number in range(load.groups):
        boxes = [_box(rng) for _ in range(_long_tail(rng, 1, 6))]
        sample = Sample(
            sample_id=f"bench-{number}",
            scene_id=f"bench-{number}",
            dataset="bench",
            split="grpo",
            question="How many things stand on the table?",
            question_type="",
            answer=str(len(boxes)),
            boxes=tuple(boxes),
            width=load.width,
            height=load.height,
            image=b"",
            depth_image=depths[number % len(depths)],
            depth_source="exact",
            source_frame="image",
        )
        groups.append(Group(sample, [_text(rng, sample) for _ in range(load.group_size)]))
    return groups


def _text(rng: random.Random, sample: Sample) -> str:
    frames = forward_frames(sample.boxes, sample.width, sample.height, np.random.default_rng(rng.getrandbits(32)))
    frames += [frames[-1]] * (_long_tail(rng, 1, 8) - 1)  # further looks at the same place
    steps = [Step(tuple(AreaBox(_moved(rng, box), rng.random()) for box in frame), _sentence(rng)) for frame in frames]
    text = Trace(tuple(steps), rng.choice([sample.answer, "none", f"There are {sample.answer}."])).render()
    spoilt = rng.random()
    if spoilt < 0.1:
        return text[: rng.randrange(len(text))]
    return text.replace('"depth"', "depth", 1) if spoilt < 0.15 else text


def _long_tail(rng: random.Random, low: int, high: int) -> int:
    """A number from `low` on, each half as frequent as the one before, cut at `high`."""
    return min(low + int(rng.expovariate(0.7)), high)


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=min(int(rng.lognormvariate(3.0, 0.7)) + 3, 200))) + "."


def _box(rng: random.Random) -> Box:
    width, height = rng.uniform(0.05, 0.4), rng.uniform(0.05, 0.4)
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return as_box((round(x, 3), round(y, 3), round(x + width, 3), round(y + height, 3)))


def _moved(rng: random.Random, box: Sequence[float]) -> Box:
    """The box with every side moved a little, never turned inside out; the whole image stays."""
    if box == FULL_IMAGE:
        return FULL_IMAGE
    x1, y1, x2, y2 = (round(min(max(side + rng.gauss(0, 0.01), 0.0), 1.0), 3) for side in box)
    return as_box((x1, y1, x2, y2)) if x1 < x2 and y1 < y2 else as_box(box)


def _depth(load: Load, number: int) -> npt.NDArray[np.float64]:
    """Smooth hills, as estimated depth has."""
    y, x = np.mgrid[0 : load.height, 0 : load.width]
    waves = np.sin(x / (40 + 5 * number)) + np.cos(y / (30 + 3 * number)) + y / load.height
    hills: npt.NDArray[np.float64] = (waves - waves.min()) / np.ptp(waves)
    return hills
