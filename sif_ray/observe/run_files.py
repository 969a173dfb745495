"""Everything that a quickstart, or a GRPO run alone, has written so far, read once for the summary and the report."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sif_ray import config as configuration
from sif_ray.config import ConfigError, GrpoConfig, QuickstartConfig
from sif_ray.observe import jsonl
from sif_ray.observe.completions import read_completions
from sif_ray.observe.metrics import read_metrics
from sif_ray.observe.timeline import Span, read_timeline
from sif_ray.records import Sample, sample_from_row

TOYWORLD = "toyworld"
_STAGE_OF_KEY = {"run_dir": "quickstart", "groups_per_step": "grpo"}


@dataclass(frozen=True)
class RunFiles:
    """The files of one run folder. Of a stage that has not run, or is not part of it, the file is None or empty."""

    path: Path
    config: QuickstartConfig | GrpoConfig
    environment: dict[str, Any]
    stage_seconds: dict[str, float]
    warmup: list[dict[str, float]]  # one record per logged step
    grpo: list[dict[str, float]]
    grpo_finished: bool
    timeline: list[Span]
    completions: list[dict[str, Any]]  # best and worst of every step
    results: dict[str, Any] | None  # of the evaluation
    items: list[dict[str, Any]]
    response: dict[str, Any] | None  # what was served

    @property
    def grpo_config(self) -> GrpoConfig:
        return _of_grpo(self.path, self.config)[1]

    @property
    def grpo_path(self) -> Path:
        return _of_grpo(self.path, self.config)[0]

    @property
    def is_toy(self) -> bool:
        """Whether it was trained on rendered scenes, as far as that can be seen from here."""
        if isinstance(self.config, QuickstartConfig):
            return self.config.generate.source == TOYWORLD
        manifest = _json(Path(self.config.data) / "manifest.json") or {}
        return manifest.get("config", {}).get("source") == TOYWORLD

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
    """Read the folder of a run, which may still be at work. Raises `ConfigError` for a folder of anything else."""
    path = Path(run_dir)
    config = _config(path / "config.yaml")
    grpo, _ = _of_grpo(path, config)
    stages = _json(path / "stages.json") or {}
    items = path / "evaluate" / "items.jsonl"
    metrics = {"warmup": path / "warmup" / "metrics.jsonl", "grpo": grpo / "metrics.jsonl"}
    timeline = grpo / "timeline.jsonl"
    return RunFiles(
        path=path,
        config=config,
        environment=_json(path / "environment.json") or {},
        stage_seconds={name: float(stage["seconds"]) for name, stage in stages.items()},
        warmup=read_metrics(metrics["warmup"]) if metrics["warmup"].exists() else [],
        grpo=read_metrics(metrics["grpo"]) if metrics["grpo"].exists() else [],
        grpo_finished=(grpo / "finished.json").exists(),
        timeline=read_timeline(timeline) if timeline.exists() else [],
        completions=read_completions(grpo),
        results=_json(path / "evaluate" / "results.json"),
        items=jsonl.read(items) if items.exists() else [],
        response=_json(path / "serve" / "response.json"),
    )


def _config(path: Path) -> Any:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    keys = {line.partition(":")[0] for line in text.splitlines()}
    stage = next((stage for key, stage in _STAGE_OF_KEY.items() if key in keys), None)
    if stage is None:
        raise ConfigError(f"{path.parent} is the folder of no quickstart and of no GRPO run, by its {path.name}")
    return configuration.load(stage, str(path))


def _of_grpo(path: Path, config: QuickstartConfig | GrpoConfig) -> tuple[Path, GrpoConfig]:
    return (path / "grpo", config.grpo) if isinstance(config, QuickstartConfig) else (path, config)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
