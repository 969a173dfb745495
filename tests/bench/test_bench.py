"""The machinery of the benchmarks, on loads so small that their figures mean nothing."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI

from sif_ray.bench import SUITES
from sif_ray.bench.chat_server import chat_server
from sif_ray.bench.datagen import Load, measure_memory, measure_throughput, steady_rate, write_source
from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.bench.memory import MemoryWatch
from sif_ray.cli import run_job
from sif_ray.datagen.source import make_source
from sif_ray.method.prompts import teacher_content, teacher_system
from sif_ray.method.trace import AreaBox, parse

SMALL = Load(rows=12, memory_rows=6, latency_s=0.05, in_flight=4, threads=3)


def test_a_goal_is_a_bound_from_one_side():
    assert [Goal("", value, 2.0, at_least=True).ok for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [Goal("", value, 2.0, at_least=False).ok for value in (1.9, 2.0, 2.1)] == [True, True, False]
    assert "MISSED" in Goal("rate", 1.0, 2.0, at_least=True).told()


def test_works_are_done_in_turns():
    done = []
    found = interleaved({name: lambda name=name: done.append(name) or len(done) for name in "ab"}, 2)
    assert done == ["a", "b", "a", "b"]
    assert found == {"a": [1, 3], "b": [2, 4]}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}


def test_the_file_says_whether_all_goals_are_met(tmp_path):
    goals = [Goal("a", 3.0, 2.0, at_least=True), Goal("b", 3.0, 2.0, at_least=False)]
    for kept, ok in ((goals, False), (goals[:1], True)):
        Findings(kept, {"x": 1}).write(tmp_path / "new" / "out.json", "suite", 1.0)
        found = json.loads((tmp_path / "new" / "out.json").read_text())
        assert (found["suite"], found["ok"], found["figures"]) == ("suite", ok, {"x": 1})
    assert found["goals"] == [{"name": "a", "value": 3.0, "goal": 2.0, "ok": True}]
    assert found["environment"]["num_cpus"] >= 1


def test_the_rate_is_that_of_the_middle():
    slow_start_and_end = [0.0, 9.0, *(10 + index / 4 for index in range(16)), 20.0, 30.0]
    assert steady_rate(slow_start_and_end) == pytest.approx(4.0)


def test_memory_of_children_counts():
    with MemoryWatch(every_s=0.05) as watch:
        held = bytearray(300 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    assert watch.peak_gib > 0.29


def test_the_server_writes_the_trace_that_it_is_asked_for():
    areas = [(AreaBox((0, 0, 1, 1), 0.5),), (AreaBox((0.1, 0.2, 0.3, 0.4), 0.25), AreaBox((0.5, 0.2, 0.6, 0.4), 1.0))]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}
    user = [image if part["type"] == "image" else part for part in teacher_content(areas)]
    system = {"role": "system", "content": teacher_system('How "many"?', 'é "2"')}
    with chat_server(0.01) as server, OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client:
        replies = [
            client.chat.completions.create(model="m", messages=[system, {"role": "user", "content": user}])
            for _ in range(2)
        ]
        easy = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Which colour?"}])
    for reply in replies:
        trace = parse(reply.choices[0].message.content.strip("`\n"))
        assert [step.boxes for step in trace.steps] == areas
        assert trace.answer == 'é "2"'
    assert easy.choices[0].message.content == "Green."
    assert (len(server.replied_s), server.most_in_flight) == (3, 1)


def test_photographs_are_as_many_as_asked_and_all_annotations_are_usable(tmp_path):
    config = write_source(tmp_path / "photos", rows=6, photos=4, size=(64, 48))
    annotations = list(make_source(config).annotations())
    assert [item.error for item in annotations] == [""] * 6
    assert len({make_source(config).open(item).image for item in annotations}) == 4


@pytest.mark.slow
def test_the_suite_runs_and_its_figures_are_those_of_real_rows(ray_local, tmp_path):
    throughput = measure_throughput(tmp_path, SMALL, repetitions=1)
    assert throughput.goals[0].goal == pytest.approx(0.85 * 80)
    for way in ("pipeline", "script"):
        assert throughput.figures[way]["rows_per_s"]["median"] > 0
        assert 1 <= throughput.figures[way]["most_in_flight"]["max"] <= SMALL.in_flight
    memory = measure_memory(tmp_path, SMALL)
    assert memory.figures["rows"] == 6
    assert memory.figures["peak_gib"] > 0.1


def test_a_suite_that_is_unknown_is_a_wrong_request(capsys):
    assert run_job("bench", ["nothing"]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in SUITES)
