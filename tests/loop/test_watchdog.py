"""Who is stuck and who only waits, on a clock of the test's own."""

from __future__ import annotations

from sif_ray.loop.watchdog import Watchdog


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(stuck_after_s: float = 600.0) -> tuple[Watchdog, Clock]:
    clock = Clock()
    return Watchdog(stuck_after_s, clock), clock


def test_party_that_answers_nothing_is_stuck_and_the_message_says_with_what():
    dog, clock = make()
    with dog.call("engine 0", "generate 0/p3"):
        clock.now_s = 100.0
        with dog.call("engine 0", "generate 0/p4"):
            clock.now_s = 599.0
            assert dog.stuck() == {}
            clock.now_s = 640.0
            assert dog.stuck() == {
                "engine 0": "has answered nothing for 640 s; 2 calls under way, the oldest for 640 s: generate 0/p3"
            }
    assert dog.stuck() == {} and dog.report() == ""


def test_party_that_answers_other_calls_is_slow_and_not_stuck():
    dog, clock = make()
    with dog.call("engine 0", "generate 0/slow"):
        for clock.now_s in (500.0, 1000.0, 1500.0):
            with dog.call("engine 0", "generate 0/quick"):
                clock.now_s += 50.0
            assert dog.stuck() == {}
        clock.now_s += 600.0
        assert list(dog.stuck()) == ["engine 0"]


def test_time_without_work_does_not_count():
    dog, clock = make()
    with dog.call("the learner", "train version 0"):
        pass
    clock.now_s = 10_000.0
    with dog.call("the learner", "train version 1"):
        clock.now_s += 599.0
        assert dog.stuck() == {}
        clock.now_s += 1.0
        assert list(dog.stuck()) == ["the learner"]


def test_who_waits_is_reported_and_never_stuck():
    dog, clock = make()
    with dog.waiting("the sync", "receipts of version 5"), dog.call("engine 1", "update to version 5"):
        clock.now_s = 700.0
        assert list(dog.stuck()) == ["engine 1"]
        assert dog.report().splitlines() == [
            "engine 1: 1 call under way, the oldest for 700 s: update to version 5",
            "the sync: waits for receipts of version 5, for 700 s",
        ]


def test_successor_does_not_inherit_the_calls_of_a_lost_worker():
    dog, clock = make()
    with dog.call("engine 0", "generate 0/p3"):
        clock.now_s = 700.0
        dog.forget("engine 0")
        with dog.call("engine 0", "start"):
            assert dog.stuck() == {}


def test_nobody_is_stuck_when_it_is_off():
    dog, clock = make(0.0)
    with dog.call("engine 0", "start"):
        clock.now_s = 1e9
        assert dog.stuck() == {}
