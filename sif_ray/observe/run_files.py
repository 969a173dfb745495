"""Everything a quickstart run has written, read once for the summary and the report."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sif_ray import config as configuration
from sif_ray.observe import jsonl
from sif_ray.observe.completions import read_completions
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import Span, read_timeline
from sif_ray.records import Sample, sample_from_row


@dataclass(frozen=True)
class RunFiles:
    """The files of one run folder. Of a stage that has not run the file is None or empty."""

    path: Path
    config: configuration.QuickstartConfig
    environment: dict[str, Any]
    stage_seconds: dict[str, float]
    warmup: list[dict[str, float]]  # one record per logged step
    grpo: list[dict[str, float]]
    timeline: list[Span]
    completions: list[dict[str, Any]]  # best and worst of every step
    results: dict[str, Any] | None  # of the evaluation
    items: list[dict[str, Any]]
    response: dict[str, Any] | None  # what was served

    @property
    def compared(self) -> tuple[str, str] | None:
        """Names of the checkpoints before and after GRPO, None without an evaluation of both."""
        comparison = self.results["comparison"] if self.results else None
        return (comparison["baseline"], comparison["checkpoint"]) if comparison else None

    def samples(self, sample_ids: Collection[str]) -> dict[str, Sample]:
        """Rows of the dataset by id; ids it does not have are absent."""
        found: dict[str, Sample] = {}
        for shard in self._shards() if sample_ids else ():  # Arrow cannot filter by an empty list
            rows = pq.read_table(shard, filters=[("sample_id", "in", list(sample_ids))]).to_pylist()
            found |= {row["sample_id"]: sample_from_row(row) for row in rows}
        return found

    def dataset_counts(self) -> dict[str, dict[str, int]]:
        """{split: {"rows", "scenes"}}."""
        scenes: dict[str, list[str]] = {}
        for shard in self._shards():
            for row in pq.read_table(shard, columns=["split", "scene_id"]).to_pylist():
                scenes.setdefault(row["split"], []).append(row["scene_id"])
        return {split: {"rows": len(ids), "scenes": len(set(ids))} for split, ids in sorted(scenes.items())}

    def _shards(self) -> list[Path]:
        return sorted((self.path / "data" / "data").glob("*.parquet"))  # beside them, rejected/ has the refused rows


def read_run(run_dir: str | Path) -> RunFiles:
    """Read the folder of a quickstart run. Raises `FileNotFoundError` if it has no config.yaml or environment.json."""
    path = Path(run_dir)
    stages = _json(path / "stages.json") or {}
    items = path / "evaluate" / "items.jsonl"
    metrics = {name: path / name / "metrics.jsonl" for name in ("warmup", "grpo")}
    timeline = path / "grpo" / "timeline.jsonl"
    return RunFiles(
        path=path,
        config=configuration.load("quickstart", str(_existing(path / "config.yaml"))),
        environment=_json(_existing(path / "environment.json")) or {},
        stage_seconds={name: float(stage["seconds"]) for name, stage in stages.items()},
        warmup=read_metrics(metrics["warmup"]) if metrics["warmup"].exists() else [],
        grpo=read_metrics(metrics["grpo"]) if metrics["grpo"].exists() else [],
        timeline=read_timeline(timeline) if timeline.exists() else [],
        completions=read_completions(path / "grpo"),
        results=_json(path / "evaluate" / "results.json"),
        items=jsonl.read(items) if items.exists() else [],
        response=_json(path / "serve" / "response.json"),
    )


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {path.parent} is not the folder of a quickstart run")
    return path


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
