"""`sif-ray eval compare`: two files of predictions on the same items."""

from __future__ import annotations

import argparse
from pathlib import Path

from sif_ray.evaluate.benchmarks import choose
from sif_ray.evaluate.comparison import compare
from sif_ray.evaluate.score import add_common_arguments, check_options, fingerprint, judge_name, read
from sif_ray.observe.run_folder import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray eval compare`."""
    add_common_arguments(parser)
    parser.add_argument("--predictions", metavar="FILE.jsonl", required=True, help="of the one policy")
    parser.add_argument("--baseline", metavar="FILE.jsonl", required=True, help="of the one that it is compared with")


def run(options: argparse.Namespace) -> None:
    """Write differences, intervals and McNemar's test. Raises `ConfigError` for wrong files."""
    benchmark = choose(options.benchmark, Path(options.annotations))
    judge = check_options(options, benchmark)
    ours, theirs = (read(options, benchmark, path, judge) for path in (options.predictions, options.baseline))
    result = compare(benchmark, ours.replies, theirs.replies, num_samples=options.bootstrap_samples, seed=options.seed)
    inputs = {name: fingerprint(getattr(options, name)) for name in ("annotations", "predictions", "baseline")}
    named = {"benchmark": benchmark.name, "judge": judge_name(judge) if benchmark.judged else None}
    write_json(Path(options.json), {**named, **result, "inputs": inputs})
