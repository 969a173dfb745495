"""Processor sharing against a machine that writes token by token."""

from __future__ import annotations

import random
from collections import deque

import pytest

from sif_ray.plan.engine import Engine, Group

STEP_S = (0.0, 1.0, 1.5, 1.75, 2.0)  # by the number of sequences


def run_to_end(engine: Engine) -> dict[str, float]:
    ends: dict[str, float] = {}
    while (next_s := engine.next_s()) < float("inf"):
        for group in engine.advance(next_s):
            ends[group.key] = next_s
    return ends


def token_by_token(arrivals: list[tuple[int, str, list[int]]], places: int) -> dict[str, int]:
    """Ends of groups where every step takes 1 s; `arrivals` come before the step of their number."""
    waiting: deque[list] = deque()
    running: list[list] = []
    left = {name: len(lengths) for _, name, lengths in arrivals}
    ends: dict[str, int] = {}
    for step in range(10_000):
        for at, name, lengths in arrivals:
            if at == step:
                waiting.extend([name, length] for length in lengths)
        while waiting and len(running) < places:
            running.append(waiting.popleft())
        for sequence in running:
            sequence[1] -= 1
            if not sequence[1]:
                left[sequence[0]] -= 1
                if not left[sequence[0]]:
                    ends[sequence[0]] = step + 1
        running = [sequence for sequence in running if sequence[1]]
        if len(ends) == len(arrivals):
            return ends
    raise AssertionError("never done")


def test_two_sequences_share_and_the_longer_one_goes_on_alone():
    engine = Engine((0.0, 0.01, 0.012), max_num_seqs=2)
    engine.add(Group("a", [100, 50]), 0.0)
    assert engine.next_s() == pytest.approx(50 * 0.012 + 50 * 0.01)
    assert run_to_end(engine) == {"a": pytest.approx(1.1)}
    assert engine.tokens == pytest.approx(150) and engine.busy_s == pytest.approx(1.1)


def test_a_group_that_comes_later_slows_the_first_one_from_then_on():
    engine = Engine(STEP_S, max_num_seqs=4)
    engine.add(Group("a", [10]), 0.0)
    engine.advance(4.0)
    engine.add(Group("b", [2]), 4.0)  # 2 steps of 1.5 s together, then 4 of 1 s
    assert run_to_end(engine) == {"b": pytest.approx(7.0), "a": pytest.approx(11.0)}


def test_prompt_and_pause_hold_everything_up():
    engine = Engine(STEP_S, max_num_seqs=4, prefill_s=0.5)
    engine.add(Group("a", [4]), 0.0)
    engine.advance(2.5)
    engine.stand_still(3.0)
    assert run_to_end(engine) == {"a": pytest.approx(7.5)}


def test_slowdown_counts_while_it_lasts():
    engine = Engine(STEP_S, max_num_seqs=1)
    engine.add(Group("a", [10]), 0.0)
    engine.advance(4.0)
    engine.slowdown = 2.0
    engine.advance(8.0)
    engine.slowdown = 1.0
    assert run_to_end(engine) == {"a": pytest.approx(12.0)}


def test_oldest_token_is_of_the_version_at_which_the_first_sequence_began():
    engine = Engine(STEP_S, max_num_seqs=1)
    engine.add(Group("a", [3]), 0.0)
    engine.add(Group("b", [3]), 0.0)
    engine.advance(1.0)
    engine.version = 7
    (first,) = engine.advance(engine.next_s())
    (second,) = engine.advance(engine.next_s())
    assert (first.key, first.version, second.key, second.version) == ("a", 0, "b", 7)


@pytest.mark.parametrize("seed", range(20))
def test_any_arrivals_end_when_an_engine_that_counts_tokens_ends_them(seed):
    rng = random.Random(seed)
    places = rng.randint(1, 6)
    arrivals = [(rng.randint(0, 40), f"g{k}", [rng.randint(1, 30) for _ in range(rng.randint(1, 4))]) for k in range(9)]
    arrivals.sort()
    engine, ends = Engine((1.0,) * 7, max_num_seqs=places), {}
    for at, name, lengths in arrivals:
        while (next_s := engine.next_s()) <= at:
            ends |= {group.key: next_s for group in engine.advance(next_s)}
        ends |= {group.key: at for group in engine.advance(float(at))}
        engine.add(Group(name, lengths), float(at))
    ends |= run_to_end(engine)
    assert ends == pytest.approx(token_by_token(arrivals, places))
    assert engine.tokens == pytest.approx(sum(sum(lengths) for *_, lengths in arrivals))
