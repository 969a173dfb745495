"""`sif-ray eval score`: the scores of saved outputs, without a model."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, JudgeConfig, load_block
from sif_ray.evaluate.benchmarks import BENCHMARKS, choose
from sif_ray.evaluate.benchmarks.item import Benchmark
from sif_ray.evaluate.markdown import to_markdown
from sif_ray.evaluate.predictions import Matched, match
from sif_ray.evaluate.reference import references
from sif_ray.evaluate.scoring import judged, score
from sif_ray.judge.factory import check_judge, make_judge
from sif_ray.observe.run_folder import write_json

BOOTSTRAP_SAMPLES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray eval score`."""
    add_common_arguments(parser)
    parser.add_argument("--predictions", metavar="FILE.jsonl", required=True, help='lines {"id": ..., "text": ...}')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What scoring one and comparing two files of predictions share."""
    parser.add_argument(
        "--benchmark", choices=BENCHMARKS, required=True, metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}"
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        required=True,
        help="the benchmark's file as published, or a folder of them; `sif-ray eval list` says where it comes from. An "
        "id is the annotation's own (question_id, sent_id, ...), its 0-based position where it has none, and "
        "`<category>/<id>` in a folder",
    )
    parser.add_argument("--answers", metavar="PATH", help="the labels of a benchmark whose questions come without them")
    parser.add_argument("--json", metavar="OUT", required=True, help="where the result goes")
    parser.add_argument(
        "--judge",
        metavar="exact|FILE.yaml",
        default="exact",
        help="who scores free answers (viscot): text comparison, or the chat model that a YAML file with the keys of "
        "`judge` in a configuration describes; its cache and audit log are kept in OUT.judge (default: exact)",
    )
    parser.add_argument("--bootstrap-samples", type=int, default=BOOTSTRAP_SAMPLES, metavar="N", help="(default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def run(options: argparse.Namespace) -> None:
    """Score the predictions, write the result and print it as Markdown. Raises `ConfigError` for wrong files."""
    benchmark = choose(options.benchmark, Path(options.annotations))
    judge = check_options(options, benchmark)
    matched = read(options, benchmark, options.predictions, judge)
    result = score(benchmark, matched, num_samples=options.bootstrap_samples, seed=options.seed)
    result["judge"] = judge_name(judge) if benchmark.judged else None
    result["inputs"] = {name: fingerprint(getattr(options, name)) for name in ("annotations", "predictions")}
    write_json(Path(options.json), result)
    sys.stdout.write(to_markdown(result, references(benchmark.name)))


def check_options(options: argparse.Namespace, benchmark: Benchmark) -> JudgeConfig:
    """The judge's configuration. Raises `ConfigError` for what cannot work, before anything is read."""
    if options.bootstrap_samples < 1:
        raise ConfigError(f"--bootstrap-samples {options.bootstrap_samples}: at least one is needed for an interval")
    if not Path(options.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: there is no such folder")
    if options.judge == "exact":
        return JudgeConfig()
    config: JudgeConfig = load_block(JudgeConfig, options.judge)
    config = replace(config, with_image=False)  # the benchmark's judge reads text alone
    if benchmark.judged:
        check_judge(config)
    return config


def read(options: argparse.Namespace, benchmark: Benchmark, predictions: str, judge: JudgeConfig) -> Matched:
    """The replies of a file of predictions, with verdicts where the benchmark is judged."""
    items = list(benchmark.items(Path(options.annotations), Path(options.answers) if options.answers else None))
    if unlabelled := [item.item_id for item in items if not item.has_truth]:
        raise ConfigError(
            f"--annotations {options.annotations}: {len(unlabelled)} of {len(items)} questions have no answer to score "
            f"with, e.g. id {unlabelled[0]!r}. {benchmark.obtain}"
        )
    matched = match(items, Path(predictions))
    if not benchmark.judged:
        return matched
    folder = Path(f"{options.json}.judge")
    return replace(matched, replies=tuple(asyncio.run(judged(matched.replies, lambda: make_judge(judge, folder)))))


def judge_name(judge: JudgeConfig) -> dict[str, Any]:
    """What the result says about its judge."""
    return {"kind": judge.kind, "model": judge.model} if judge.kind == "llm" else {"kind": judge.kind}


def fingerprint(path: str) -> dict[str, Any]:
    """{"path", "sha256"}; of a folder the path alone."""
    if Path(path).is_dir():
        return {"path": path, "sha256": None}
    with Path(path).open("rb") as file:
        return {"path": path, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
