"""`python jobs/report.py` is `sif-ray report`; its --help tells the arguments."""

from __future__ import annotations

from collections.abc import Sequence

from sif_ray.cli import run_job


def main(argv: Sequence[str] | None = None) -> int:
    return run_job("report", argv)


if __name__ == "__main__":
    raise SystemExit(main())
