"""`sif-ray eval list`: the benchmarks, what their files are and where they come from."""

from __future__ import annotations

import argparse
import sys
import textwrap

from sif_ray.evaluate.benchmarks import BENCHMARKS

_WIDTH = 110  # characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sif-ray eval list`."""
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS, metavar="NAME", help="only this one")


def run(options: argparse.Namespace) -> None:
    """Print them."""
    for name in [options.benchmark] if options.benchmark else BENCHMARKS:
        benchmark = BENCHMARKS[name]
        sys.stdout.write(f"{name}\n")
        for text in (benchmark.summary, benchmark.obtain, benchmark.conventions):
            sys.stdout.write(textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="  ") + "\n")
        sys.stdout.write("\n")
