"""Coverage-guided fuzzing of a target: `python tests/fuzz/fuzz.py TARGET CORPUS [libFuzzer's options]`.

It begins with the files in `corpus/TARGET`, keeps what reaches new code in the folder CORPUS, and ends at the first
finding, whose bytes it leaves in a file. A finding that was mended belongs into `corpus/TARGET`, where the default
tests try it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

CORPUS = Path(__file__).with_name("corpus")


def main(name: str, found: str, *options: str) -> None:
    with atheris.instrument_imports(include=["sif_ray"]):
        from targets import TARGETS

    def try_one(data: bytes) -> None:
        TARGETS[name](data)

    atheris.Setup([sys.argv[0], found, str(CORPUS / name), *options], try_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
