"""The stage's own course on fake parts, in this process or in one that can be killed."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from loop_fakes import FakeEngine, FakeFactory, FakeLearner, FakeScorer, Rig

from sif_ray.checkpoints import remove_leftovers
from sif_ray.loop import stage
from sif_ray.loop.checkpoint import Checkpoints
from sif_ray.loop.rewarder import GroupScores, ScoringFailed
from sif_ray.observe.run_folder import RunFolder
from sif_ray.observe.timeline import Timeline
from sif_ray.toyworld.render import png

PROMPTS, EPOCHS = 50, 3
HOPELESS = "p3"  # the judge has no verdict on it, ever
MAX_STALENESS = 2


class DiskLearner(FakeLearner):
    """Its weights are the list of what it was trained on, and it saves them to files as slowly as it trains."""

    def __init__(self, rng: random.Random, slow_s: float) -> None:
        super().__init__(rng, slow_s)
        self.ended = False

    async def start(self, total_steps: int) -> None:
        await asyncio.sleep(self.rng.random() * self.slow_s)

    async def save_checkpoint(self, folder: str, client_state: dict[str, Any]) -> None:
        assert client_state == {"version": self.version}
        state = {"version": self.version, "trained": self.trained}
        await asyncio.sleep(self.rng.random() * self.slow_s)
        Path(folder).mkdir()
        (Path(folder) / "weights.json").write_text(json.dumps(state))

    async def load_checkpoint(self, folder: str) -> dict[str, Any]:
        saved = json.loads((Path(folder) / "weights.json").read_text())
        self.version, self.trained = saved["version"], saved["trained"]
        return {"version": self.version}

    async def save_policy(self, output: str) -> None:
        Path(output).mkdir(exist_ok=True)
        (Path(output) / "weights.json").write_text(json.dumps(self.trained))

    async def check_alive(self) -> None:
        pass

    def shutdown(self) -> None:
        self.ended = True


class FickleScorer(FakeScorer):
    """Has no verdict on one prompt, and often none at the first time."""

    async def score(self, texts_G, sample, previous) -> GroupScores | ScoringFailed:
        scores = await super().score(texts_G, sample, previous)
        if sample.sample_id == HOPELESS:
            return ScoringFailed("judge abstained: no reference", retry=False)
        return ScoringFailed("judge failed: 429", retry=True) if self.rng.random() < 0.1 else scores


def parts_of(
    output: Path,
    *,
    seed: int = 0,
    slow_s: float = 0.01,
    make_learner: Callable[..., Any] = DiskLearner,
    make_scorer: Callable[..., Any] = FickleScorer,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> stage.Parts:
    """All that `stage.train` needs; the delays and failures depend on `seed`, the run does not."""
    rng = random.Random(seed)
    settings_of_life = {"checkpoint_every": 2, "max_staleness": MAX_STALENESS, "parity_every": 1000, "trackers": []}
    rig = Rig(num_prompts=PROMPTS, epochs=float(EPOCHS), **(settings_of_life | changes))
    image = png(np.zeros((8, 8, 3), np.uint8))
    samples = {name: replace(sample, image=image, depth_image=image) for name, sample in rig.samples.items()}
    checkpoints = Checkpoints(output / "checkpoints", settings or {}, keep=2)
    remove_leftovers(output, checkpoints.folder, resume=True, growing=stage.GROWING)
    return stage.Parts(
        rig.config,
        samples,
        [],
        RunFolder(output),
        Timeline(output / stage.STARTUP),
        checkpoints,
        engines=FakeFactory([], lambda: FakeEngine(rng, slow_s), rng, slow_s),
        scorers=FakeFactory([], lambda: make_scorer(rng, slow_s), rng, slow_s),
        make_learner=lambda: make_learner(rng, slow_s),
    )


def live(output: Path, seed: int) -> None:
    """One life of a driver, to the end of the run."""
    asyncio.run(stage.train(parts_of(output, seed=seed)))
