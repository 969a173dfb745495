"""The trail of a run: which groups made each policy version, in a file that is only ever appended to.

It is written beside the ledger, not from it, so that what the ledger promises can be checked from outside: every ticket
is trained once, and no token older than the bound.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sif_ray.observe import jsonl
from sif_ray.records import ScoredGroup


class Trail:
    """Appends `{"version": 13, "oldest_versions": {"0/toy-7": 12, ...}}` after every training step.

    `continue_from` is the version at which this process starts: what was done after it does not count any more.
    """

    def __init__(self, path: str | Path, continue_from: int) -> None:
        self._file = jsonl.open_for_append(Path(path))
        self._file.write(jsonl.to_line({"continue_from": continue_from, "time_s": time.time()}))

    def trained(self, version: int, groups: Sequence[ScoredGroup]) -> None:
        """The step that made `version` was done on `groups`."""
        oldest_versions = {scored.group.ticket_id: scored.group.oldest_version for scored in groups}
        self._file.write(jsonl.to_line({"version": version, "oldest_versions": oldest_versions}))

    def close(self) -> None:
        """Close the file; every line is already in it."""
        self._file.close()


def read_trail(path: str | Path) -> dict[int, dict[str, int]]:
    """{version: {ticket id: version of its group's oldest token}} of the steps that count, ascending."""
    steps: dict[int, dict[str, int]] = {}
    for line in jsonl.read(Path(path)):
        if "continue_from" in line:
            steps = {version: tickets for version, tickets in steps.items() if version <= line["continue_from"]}
        else:
            steps[line["version"]] = line["oldest_versions"]
    return steps
