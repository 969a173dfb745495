"""The suite `datagen`: rows per second with a model as teacher, and the memory of a long run.

Throughput: every row has a photograph of 640 x 480 pixels of its own; the teacher answers after 400 ms and takes 32
requests at a time, so no more than 80 rows/s can be made. The same rows are made by a plain script with 30 threads (as
the released one has), in turns. Depth is in the cache, as an earlier run or GPUs leave it there: the released script,
too, finds its depth on disk. What it costs to estimate it on the CPUs that do all the rest is measured apart. All rates
are those of the teacher's replies from the first tenth of the rows to the last: start of Ray, filling and emptying of
the pipeline lie outside.

Memory: 100,000 rows about few small photographs, whose traces are those of the template teacher.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sif_ray.bench.chat_server import chat_server
from sif_ray.bench.findings import Findings, Goal, interleaved, spread
from sif_ray.bench.memory import MemoryWatch
from sif_ray.config import GenerateConfig, RayConfig, TeacherConfig
from sif_ray.datagen import stage
from sif_ray.datagen.annotations import Annotation
from sif_ray.datagen.chat_teacher import lesson
from sif_ray.datagen.checks import faults
from sif_ray.datagen.dataset import read_manifest
from sif_ray.datagen.depth_stage import AddDepth
from sif_ray.datagen.drafts import Draft, drafts_to_table
from sif_ray.datagen.model_traces import rendered
from sif_ray.datagen.pipeline import open_draft
from sif_ray.datagen.shards import table_bytes
from sif_ray.datagen.source import make_source
from sif_ray.datagen.traces import areas_of, with_frames
from sif_ray.depth.encoding import read_gray

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)

SHARE_OF_IDEAL = 0.85
MEMORY_GIB = 4e9 / 2**30
_TEACHERS = 2  # processes that prepare requests: one would have one core
_DEPTH_ACTORS = 1  # enough here; a second one that comes and goes loads its model each time
_RAY_CPUS = 6  # logical: room for both pools at their largest, and for tasks
_MEMORY_PHOTOS = 64
_SERIES = 60  # samples of memory that are kept


@dataclass(frozen=True)
class Load:
    """How much work, and against which teacher."""

    rows: int = 1600  # about half a minute of each way
    memory_rows: int = 100_000
    latency_s: float = 0.4
    in_flight: int = 32
    threads: int = 30

    @property
    def ideal_rows_per_s(self) -> float:
        return self.in_flight / self.latency_s


def measure(repetitions: int, load: Load = Load()) -> Findings:
    """Both measurements. Memory is measured once: it is a long run."""
    with tempfile.TemporaryDirectory(prefix="sif_ray-bench-") as name:
        folder = Path(name)
        throughput = measure_throughput(folder, load, repetitions)
        memory = measure_memory(folder, load)
    return Findings([*throughput.goals, *memory.goals], {"throughput": throughput.figures, "memory": memory.figures})


def measure_throughput(folder: Path, load: Load, repetitions: int) -> Findings:
    """Rows per second of the pipeline, with known and with unknown depth, and of the script."""
    unknown = write_source(folder / "photos", load.rows, load.rows, (640, 480))
    known = replace(unknown, depth_cache=str(folder / "depth"))
    fill_depth_cache(known)
    ways = {
        "pipeline": partial(_rate, run_pipeline, known, folder, load),
        "script": partial(_rate, run_script, known, folder, load),
        "pipeline_that_estimates_depth": partial(_rate, run_pipeline, unknown, folder, load),
    }
    figures: dict[str, Any] = {"load": asdict(load), "ideal_rows_per_s": load.ideal_rows_per_s}
    for name, found in interleaved(ways, repetitions).items():
        figures[name] = {key: spread([run[key] for run in found]) for key in found[0]}
    goal = SHARE_OF_IDEAL * load.ideal_rows_per_s
    rate = figures["pipeline"]["rows_per_s"]["median"]
    return Findings([Goal("rows/s of the pipeline with a model teacher", rate, goal, at_least=True)], figures)


def measure_memory(folder: Path, load: Load) -> Findings:
    """Peak memory of a long run."""
    config = write_source(folder / "few", load.memory_rows, min(_MEMORY_PHOTOS, load.memory_rows), (160, 120))
    started_s = time.monotonic()
    with MemoryWatch() as watch:
        stage.run(replace(config, output=str(folder / "long"), ray=RayConfig()))
    seconds = time.monotonic() - started_s
    samples = watch.samples_gib
    figures = {
        "rows": load.memory_rows,
        "seconds": seconds,
        "peak_gib": watch.peak_gib,
        "peak_rss_sum_gib": max(watch.rss_samples_gib),
        "series_gib": [float(max(part)) for part in np.array_split(samples, min(_SERIES, len(samples)))],
    }
    goal = Goal(f"peak memory of {load.memory_rows} rows, GiB", watch.peak_gib, MEMORY_GIB, at_least=False)
    return Findings([goal], figures)


# --- the two ways ----------------------------------------------------------------------------------------------------

Way = Callable[[GenerateConfig, Load], None]


def run_pipeline(config: GenerateConfig, load: Load) -> None:
    """`sif-ray generate`."""
    stage.run(config)
    counts = read_manifest(config.output)["counts"]
    if counts["accepted"] != load.rows:
        raise RuntimeError(f"{counts['accepted']} of {load.rows} rows were accepted: {counts['reasons']}")


def run_script(config: GenerateConfig, load: Load) -> None:
    """One process, `load.threads` threads that each take a row from photograph to checked trace, and Parquet files."""
    from openai import OpenAI

    source, add_depth = make_source(config), AddDepth(config)
    client = OpenAI(base_url=config.teacher.base_url, api_key="none", max_retries=0)

    def make_row(annotation: Annotation) -> Draft:
        (draft,) = add_depth([open_draft(source, annotation, config.profile)])
        return _script_trace(with_frames(draft, config), client, config)

    output = Path(config.output)
    output.mkdir()
    shard: list[Draft] = []
    with ThreadPoolExecutor(load.threads) as pool:
        for number, draft in enumerate(pool.map(make_row, source.annotations()), 1):
            if draft.reasons:
                raise RuntimeError(f"{draft.sample.sample_id} was refused: {draft.reasons}")
            shard.append(draft)
            if len(shard) == config.rows_per_shard or number == load.rows:
                (output / f"{number}.parquet").write_bytes(table_bytes(drafts_to_table(shard)))
                shard = []


def _script_trace(draft: Draft, client: OpenAI, config: GenerateConfig) -> Draft:
    sample = draft.sample
    depth_rel = read_gray(draft.depth_gray)
    messages: Any = lesson(sample, areas_of(sample.frames, depth_rel), config.decimals)
    teacher = config.teacher
    reply = client.chat.completions.create(
        model=teacher.model, messages=messages, temperature=teacher.temperature, max_tokens=teacher.max_tokens
    )
    trace = rendered(reply.choices[0].message.content or "", sample.profile, config.decimals)
    sample = replace(sample, trace=trace)
    return replace(draft, sample=sample).refused(*faults(sample, depth_rel, config.decimals))


def _rate(way: Way, config: GenerateConfig, folder: Path, load: Load) -> dict[str, float]:
    """Make the rows in one way, with a teacher of its own, into a folder that is removed."""
    output = folder / "made"
    started_s = time.monotonic()
    with chat_server(load.latency_s) as server:
        teacher = TeacherConfig(
            kind="llm",
            model="bench",
            base_url=server.base_url,
            max_concurrency=load.in_flight,
            actors_min=_TEACHERS,
            actors_max=_TEACHERS,
        )
        way(replace(config, teacher=teacher, output=str(output)), load)
    seconds = time.monotonic() - started_s
    shutil.rmtree(output)
    found = {
        "rows_per_s": steady_rate(server.replied_s),
        "rows_per_s_with_start_and_end": load.rows / seconds,
        "most_in_flight": float(server.most_in_flight),
    }
    log.info("bench datagen: %s, %s", way.__name__, ", ".join(f"{name} {value:.1f}" for name, value in found.items()))
    return found


def steady_rate(replied_s: Sequence[float]) -> float:
    """Replies per second from the first tenth of them to the last."""
    tenth = len(replied_s) // 10
    middle_s = replied_s[tenth : len(replied_s) - tenth]
    return (len(middle_s) - 1) / (middle_s[-1] - middle_s[0])


# --- the rows --------------------------------------------------------------------------------------------------------


def write_source(folder: Path, rows: int, photos: int, size: tuple[int, int]) -> GenerateConfig:
    """Photographs and annotations in `folder`; the configuration that reads them."""
    folder.mkdir()
    for number in range(photos):
        _photo(number, size).save(folder / f"{number}.jpg", "JPEG", quality=90)
    with (folder / "annotations.jsonl").open("w", encoding="utf-8") as file:
        for number in range(rows):
            x, y = (number * 7 % 50) / 100, (number * 11 % 50) / 100
            boxes = [[x, y, x + 0.2, y + 0.3], [x + 0.3, y + 0.1, x + 0.45, y + 0.4]][: 1 + number % 2]
            row = {
                "id": f"bench-{number}",
                "dataset": "bench",
                "image": f"{number * photos // rows}.jpg",
                "width": size[0],
                "height": size[1],
                "question": "How many things are there?",
                "answer": str(len(boxes)),
                "boxes": boxes,
            }
            file.write(json.dumps(row) + "\n")
    return GenerateConfig(
        source="jsonl",
        input=[str(folder / "annotations.jsonl")],
        images=str(folder),
        depth_actors_max=_DEPTH_ACTORS,
        ray=RayConfig(num_cpus=_RAY_CPUS),
    )


def fill_depth_cache(config: GenerateConfig) -> None:
    """Estimate the depth of every photograph of `config` into its cache."""
    source, add_depth = make_source(config), AddDepth(config)
    for annotation in source.annotations():
        add_depth([open_draft(source, annotation, config.profile)])


def _photo(number: int, size: tuple[int, int]) -> Image.Image:
    """Coloured clouds with the noise of a sensor: as a JPEG about as large as a photograph of this size."""
    rng = np.random.default_rng(number)
    clouds = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.integers(-8, 9, (size[1], size[0], 3), dtype=np.int16)
    return Image.fromarray((np.asarray(clouds) + noise).clip(0, 255).astype(np.uint8))
