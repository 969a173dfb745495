"""What a soak measures, on processes and figures that are known; and, by name, a short soak."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from sif_ray.chaos import process_tree
from sif_ray.chaos.endpoint import COME_BACK, outcome_of
from sif_ray.chaos.footprint import Footprint
from sif_ray.chaos.process_tree import ENGINE, ProcessTree
from sif_ray.chaos.promise import Violation
from sif_ray.chaos.soak import FAULTS, LEAST, MIDDLE, MOST_GROWTH, Strike, bearable_faults, grown_mb, growth
from sif_ray.chaos.soak_figure import TITLES, soak_svg
from sif_ray.cli import run_job

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; kept = bytes(range(256)) * 400_000; time.sleep(60)"])
time.sleep({seconds})
"""


@pytest.fixture
def tree(tmp_path):
    trees = []

    def start(*command: str) -> ProcessTree:
        trees.append(ProcessTree([sys.executable, "-c", *command], tmp_path / "log.txt"))
        trees[-1].start()
        return trees[-1]

    yield start
    for one in trees:
        one.end()


def wait_for(tree: ProcessTree, count: int) -> list[psutil.Process]:
    while len(found := tree.alive()) < count:
        tree.check_runs()
        time.sleep(0.05)
    return found


def test_a_footprint_is_of_the_whole_tree(tree):
    started = tree(PARENT.format(seconds=60))
    processes = wait_for(started, 2)
    while (held := Footprint.of(started)).memory_mb < 100:  # what the child keeps, as soon as it is there
        started.check_runs()
        time.sleep(0.05)
    assert held.processes == 2
    assert held.file_handles == sum(len(os.listdir(f"/proc/{process.pid}/fd")) for process in processes)
    assert held.threads == sum(len(os.listdir(f"/proc/{process.pid}/task")) for process in processes)
    assert held.memory_mb < 200
    assert set(held.memory_mb_of) == {Path(sys.executable).name}
    assert (held.object_store_mb, held.series) == (None, None)  # no cluster


EXPORTED = """# HELP ray_object_store_memory what is used
# TYPE ray_object_store_memory gauge
ray_object_store_memory{Location="MMAP_SHM"} 3e6
ray_object_store_memory{Location="SPILLED"} 1e6
sif_ray_steps{run="a"} 7
ray_serve_requests{app="sif",replica="1a",route="/"} 7
ray_serve_requests{app="sif",replica="2b",route="/"} 9
ray_serve_requests{app="sif",replica="2b",route="/readyz"} 9
"""


def test_the_cluster_is_asked_for_its_figures(tree, tmp_path):
    class Exporter(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(EXPORTED.encode())

    with HTTPServer(("127.0.0.1", 0), Exporter) as server:
        (tmp_path / "metrics_export_port_1f").write_text(str(server.server_port))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started = tree(
            "import time; time.sleep(60)", "gcs/gcs_server", f"--session-dir={tmp_path}", "--node-ip-address=127.0.0.1"
        )
        held = Footprint.of(started)
        server.shutdown()
    assert (held.object_store_mb, held.series) == (4.0, 5)  # replicas that come and go are one series
    assert Footprint.of(started).series is None  # it does not answer any more


def test_who_outlives_the_last_life_is_seen(tree, monkeypatch):
    monkeypatch.setattr(process_tree, "GONE_TIMEOUT_S", 0.2)
    started = tree(PARENT.format(seconds=5))
    wait_for(started, 2)
    assert started.wait() == 0
    with pytest.raises(Violation, match=r"left behind: .*kept = bytes"):
        started.check_gone()
    monkeypatch.undo()
    started.end()
    started.check_gone()


def test_an_engine_without_a_title_is_found(tree):
    started = tree("import time; time.sleep(60)", "from multiprocessing.spawn import spawn_main")
    assert started.one(ENGINE).pid == started.process.pid


def test_a_process_that_is_not_there_is_told_with_those_that_are(tree, monkeypatch):
    monkeypatch.setattr(process_tree, "FIND_TIMEOUT_S", 0.2)
    with pytest.raises(Violation, match=r"0 processes of nobody among \['.*time.sleep"):
        tree("import time; time.sleep(60)").one("nobody")


def test_the_proxys_error_is_told_from_the_gateways():
    page = {"content-type": "text/plain", "content-length": "21"}
    assert outcome_of(httpx.Response(500, headers=page, content=b"Internal Server Error")) in COME_BACK
    assert outcome_of(httpx.Response(500, headers=page | {"date": "now"})) == "500"
    assert outcome_of(httpx.Response(200, headers=page)) == "200"


def test_no_place_is_struck_more_often_than_a_run_puts_up_with():
    rng, strikes = random.Random(0), []
    for now_s in range(0, 20_000, 50):
        strikes.append(Strike(rng.choice(bearable_faults(strikes, now_s)), now_s, now_s))
    for place in ("engine", "scorer"):
        struck_s = [strike.struck_s for strike in strikes if strike.fault.place == place]
        assert min(fourth - first for first, fourth in zip(struck_s, struck_s[3:], strict=False)) >= 900
    assert {strike.fault for strike in strikes} == set(FAULTS)


def test_growth_sees_leaks_and_steps_and_neither_noise_nor_restarts_nor_the_start():
    rng = random.Random(0)
    noise = [rng.gauss(1000, 10) for _ in range(360)]
    assert abs(growth(noise)) < MOST_GROWTH / 5
    starting = [value - max(0, 600 - 10 * number) for number, value in enumerate(noise)]
    assert abs(growth(starting)) < MOST_GROWTH / 5
    restarts = [value / 2 if number % 40 < 5 else value for number, value in enumerate(noise)]
    assert abs(growth(restarts)) < MOST_GROWTH
    leak = [value + number / 2 for number, value in enumerate(restarts)]
    assert growth(leak) == pytest.approx(0.5 * 180 / (1000 + 0.5 * 135), rel=0.1)
    assert growth([100] * 180 + [120] * 180) == pytest.approx(0.2)
    assert growth([100, None, 100, 100, None, 100, 110, 110]) == pytest.approx(0.1)
    assert growth([1.0] * 10 + [2.0] * 10, least=20.0) == pytest.approx(1 / 20)
    assert growth([0.0] * 20) == growth([None] * 20) == 0
    assert growth([0.0] * 20 + [3.0] * 20) == 3  # of one, where there was nothing


def test_one_version_too_many_in_the_object_store_is_growth_and_the_chance_of_a_sample_is_not():
    least, middle = LEAST["object_store_mb"], MIDDLE["object_store_mb"]
    for seed in range(20):
        rng = random.Random(seed)
        held = [7.27 * rng.choices([0, 1, 2, 3], [1, 5, 6, 2])[0] for _ in range(330)]
        assert abs(growth(held, least, middle)) < MOST_GROWTH
        kept = [value + 7.27 * (number > 220) for number, value in enumerate(held)]
        assert growth(kept, least, middle) > MOST_GROWTH


def test_what_grew_is_named():
    held = [
        Footprint({"raylet": 90.0, "driver": 100.0 + n, "engine": 50.0 * (n % 7 > 0)}, 5, 3, 9, 0, 0) for n in range(40)
    ]
    assert grown_mb(held) == {"driver": 20.0, "engine": 0.0, "raylet": 0.0}


def test_the_picture_has_a_panel_for_every_figure():
    held = [Footprint({"raylet": 1000.0 + n}, 50 + n, 3, 9, 0.0 if n % 3 else None, None) for n in range(20)]
    svg = soak_svg([10.0 * n for n in range(20)], {"training": held, "serving": held}, [33.0, 120.0])
    texts = [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert set(TITLES.values()) <= set(texts)
    assert "training" in texts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_soak(tmp_path):
    """What has to warm up grows in so short a time; that all recovers, and every reply is expected, holds at once."""
    run_job("chaos soak", ["--minutes", "6", "--json", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    print({goal["name"]: goal["value"] for goal in found["goals"]})
    missed = {goal["name"] for goal in found["goals"] if not goal["ok"]}
    assert not found["figures"]["broken"]
    assert missed <= {
        f"{tree}: growth of {name}" for tree in ("training", "serving") for name in ("memory_mb", "series")
    }
    assert (tmp_path / "soak.svg").exists()


def test_so_short_a_soak_is_refused(capsys):
    assert run_job("chaos soak", ["--minutes", "0.5"]) == 2
    assert "--minutes = 0.5 must be at least 2" in capsys.readouterr().err
