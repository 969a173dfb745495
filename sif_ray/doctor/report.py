"""The findings for people, as a table on a terminal and as lines elsewhere, and as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from sif_ray.doctor.finding import FAULT, NOTE, OK, Finding

STYLES = {OK: "green", NOTE: "yellow", FAULT: "bold red"}


def counts_of(findings: Sequence[Finding]) -> dict[str, int]:
    """{"ok", "note", "fault"}: how many of each."""
    return {level: sum(finding.level == level for finding in findings) for level in (OK, NOTE, FAULT)}


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """The last line."""
    counts = counts_of(findings)
    what = f"{counts[FAULT]} faults" if counts[FAULT] != 1 else "1 fault"
    return f"{what}, {counts[NOTE]} notes, {counts[OK]} ok in {seconds:.0f} s"


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """Equal findings of several nodes as one; faults last, where they are seen."""
    nodes: dict[Finding, list[str]] = {}
    for finding in findings:
        nodes.setdefault(replace(finding, node=""), []).append(finding.node)
    order = [OK, NOTE, FAULT]
    found = [replace(finding, node=_told([name for name in names if name])) for finding, names in nodes.items()]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _told(nodes: Sequence[str]) -> str:
    return ", ".join(nodes) if len(nodes) <= 2 else f"{len(nodes)} nodes"


def show(findings: Sequence[Finding], seconds: float, stream: TextIO | None = None) -> None:
    """Write to `stream` (None = stdout)."""
    stream = stream or sys.stdout
    if stream.isatty():
        _show_table(findings, stream)
    else:
        stream.writelines(line + "\n" for finding in merged(findings) for line in _lines(finding))
    stream.write(summary(findings, seconds) + "\n")
    stream.flush()


def _lines(finding: Finding) -> list[str]:
    where = f"  [{finding.node}]" if finding.node else ""
    lines = [f"{finding.level:<5}  {finding.check}{where}: {' '.join(finding.found.split())}"]
    return [*lines, f"       fix: {finding.fix}"] if finding.fix else lines


def _show_table(findings: Sequence[Finding], stream: TextIO) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    with_nodes = any(finding.node for finding in findings)
    table = Table(box=SIMPLE_HEAD)
    for column in ("", "check", *(["node"] if with_nodes else []), "found"):
        table.add_column(column, overflow="fold")
    for finding in merged(findings):
        told = Text(" ".join(finding.found.split()))
        if finding.fix:
            told.append(f"\nfix: {finding.fix}", style="bold")
        nodes = [Text(finding.node)] if with_nodes else []
        table.add_row(Text(finding.level, style=STYLES[finding.level]), Text(finding.check), *nodes, told)
    Console(file=stream).print(table)


def as_json(findings: Sequence[Finding], stage: str | None, seconds: float) -> dict[str, Any]:
    """{"ok", "stage", "counts", "findings": [{"check", "level", "found", "fix", "node"}], "environment", "seconds"}."""
    from sif_ray.observe.run_folder import environment

    counts = counts_of(findings)
    return {
        "ok": not counts[FAULT],
        "stage": stage,
        "counts": counts,
        "findings": [asdict(finding) for finding in findings],
        "environment": environment(),
        "seconds": round(seconds, 1),
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the file of `--json`, whole or not at all."""
    from sif_ray.observe.run_folder import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
