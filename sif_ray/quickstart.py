"""Every stage in one run folder: generate, warm-up, GRPO-SIF, evaluate, serve, report.

    data ─► warmup ─► grpo ─► evaluate ─► serve ─► report.html, summary.json

Each stage is the job of the same name with its paths set. A finished stage is noted in `stages.json` with a hash of its
configuration and of the stages before it, so a second run continues after the last one that finished.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sif_ray.config import ConfigError, EvaluateConfig, GrpoConfig, QuickstartConfig, RayConfig, WarmupConfig, to_yaml
from sif_ray.runtime import ray_session

log = logging.getLogger(__name__)

SERVED_SCENE_SEED = 3_900_000_000  # no other stage draws it


def run(config: QuickstartConfig) -> None:
    """Run every stage that has not finished with this configuration, then write the report."""
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    config = with_paths(config)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    from sif_ray.observe.run_folder import RunFolder

    RunFolder(folder, config)
    book = StageBook(folder / "stages.json")
    with ray_session(config.ray):
        for name, stage, stage_config in _stages(config):
            book.run(name, stage, stage_config)
    _write_report(folder)


def with_paths(config: QuickstartConfig) -> QuickstartConfig:
    """The configuration in which every stage reads what the one before it wrote under `run_dir`."""
    folder = Path(config.run_dir)
    data, warm, tuned = str(folder / "data"), str(folder / "warmup"), str(folder / "grpo")
    checkpoints = {"warmup": f"{warm}/checkpoint", "grpo": f"{tuned}/checkpoint"}
    missing = {config.warmup.split, config.grpo.split, config.evaluate.split} - set(config.generate.scenes_per_split)
    if missing:
        raise ConfigError(
            f"generate.splits has {sorted(config.generate.scenes_per_split)} but the stages read {sorted(missing)}; "
            "add those splits or change warmup.split, grpo.split and evaluate.split"
        )
    return replace(
        config,
        generate=replace(config.generate, output=data),
        warmup=replace(config.warmup, data=data, output=warm),
        grpo=replace(config.grpo, data=data, policy=checkpoints["warmup"], output=tuned),
        evaluate=replace(config.evaluate, data=data, checkpoints=checkpoints, output=str(folder / "evaluate")),
        serve=replace(config.serve, policy=checkpoints["grpo"]),
    )


def _stages(config: QuickstartConfig) -> list[tuple[str, Callable[[Any], None], Any]]:
    from sif_ray.datagen import stage as datagen
    from sif_ray.evaluate import stage as evaluate
    from sif_ray.learner import warmup
    from sif_ray.loop import stage as loop

    def serve_one_request(serve_config: Any) -> None:
        _serve_one_request(serve_config, Path(config.run_dir) / "serve" / "response.json")

    return [
        ("generate", datagen.run, config.generate),
        ("warmup", warmup.run, config.warmup),
        ("grpo", loop.run, config.grpo),
        ("evaluate", evaluate.run, config.evaluate),
        ("serve", serve_one_request, config.serve),
    ]


class StageBook:
    """Remembers which stages ran with which configuration, and which of them finished.

    A stage is run again when its own configuration or any stage before it changed: the hash of a stage covers both.
    One that was interrupted goes on where it can; one whose hash changed starts over.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self._chain = hashlib.sha256()

    def run(self, name: str, stage: Callable[[Any], None], config: Any) -> None:
        self._chain.update(to_yaml(replace(config, ray=RayConfig())).encode())  # where it runs does not matter
        key = self._chain.hexdigest()[:16]
        noted = self._stages.get(name)
        if noted and noted["key"] == key and noted["finished"]:
            log.info("%s: finished before in %.0f s, picked up", name, noted["seconds"])
            return
        if noted and noted["key"] != key and isinstance(config, EvaluateConfig | GrpoConfig | WarmupConfig):
            config = replace(config, resume=False)
        if noted is None or noted["key"] != key:
            noted = {"key": key, "started_s": time.time(), "seconds": 0.0, "finished": False}
        self._note(name, noted)
        log.info("%s: starting", name)
        started_s = time.time()
        try:
            stage(config)
            noted["finished"] = True
        finally:
            noted["seconds"] += time.time() - started_s
            self._note(name, noted)
        log.info("%s: done in %.0f s", name, noted["seconds"])

    def _note(self, name: str, noted: dict[str, Any]) -> None:
        from sif_ray.observe.run_folder import write_json

        self._stages[name] = noted
        write_json(self._path, self._stages)


def _serve_one_request(config: Any, output: Path) -> None:
    """Ask the served policy one question about a scene that no stage has seen, over HTTP."""
    from sif_ray.observe.run_folder import write_json
    from sif_ray.serve.client import ask
    from sif_ray.serve.stage import serving
    from sif_ray.toyworld.questions import draw_questions
    from sif_ray.toyworld.render import png, render
    from sif_ray.toyworld.scenes import make_scene

    scene = make_scene(SERVED_SCENE_SEED)
    rendering = render(scene)
    question = draw_questions(scene, 1)[0]
    image = png(rendering.rgb)
    with serving(config) as base_url:
        response = ask(base_url, image, question.text)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "question": question.text,
        "truth": question.answer,
        "truth_boxes": [list(box) for box in question.boxes(rendering)],
        "image": base64.b64encode(image).decode(),
        "response": response.model_dump(),
    }
    write_json(output, record)


def _write_report(folder: Path) -> None:
    from sif_ray.observe.report import write_report
    from sif_ray.observe.summary import write_summary

    write_summary(folder)
    log.info("report: %s", write_report(folder))
