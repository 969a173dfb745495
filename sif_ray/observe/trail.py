"""The trail of a run: what made each policy version, in a file that is only ever appended to.

It is written beside the run's own books, not from them, so that what they promise can be checked from outside: every
prompt or row is trained once, and no token older than the bound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sif_ray.observe import jsonl


class Trail:
    """Appends `{"version": 13, "trained": {"0/toy-7": 12, ...}}` after every training step.

    `continue_from` is the version at which this process starts: what was done after it does not count any more.
    """

    def __init__(self, path: str | Path, continue_from: int) -> None:
        self._file = jsonl.open_for_append(Path(path))
        self._file.write(jsonl.to_line({"continue_from": continue_from, "time_s": time.time()}))

    def trained(self, version: int, trained: Mapping[str, int] | Sequence[str]) -> None:
        """The step that made `version` was done on these: {ticket id: version of its oldest token} in reinforcement
        learning, sample ids in the warm-up."""
        self._file.write(jsonl.to_line({"version": version, "trained": trained}))

    def close(self) -> None:
        """Close the file; every line is already in it."""
        self._file.close()


def read_trail(path: str | Path) -> dict[int, Any]:
    """{version: what was trained} of the steps that count, ascending."""
    steps: dict[int, Any] = {}
    for line in jsonl.read(Path(path)):
        if "continue_from" in line:
            steps = {version: trained for version, trained in steps.items() if version <= line["continue_from"]}
        else:
            steps[line["version"]] = line["trained"]
    return steps
