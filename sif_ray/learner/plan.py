"""What a warm-up will take: steps and the memory of a rank. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from sif_ray.config import ConfigError, LearnerConfig, WarmupConfig
from sif_ray.datagen.dataset import DatasetError, read_manifest
from sif_ray.learner.schedule import learning_rate
from sif_ray.resources.memory import learner_memory
from sif_ray.resources.plan import learner_lines
from sif_ray.resources.shapes import find_shape


def num_steps(config: WarmupConfig, num_rows: int) -> int:
    """Steps of a run whose epochs have `num_rows` rows. Raises `ConfigError` for fewer rows than a batch."""
    if num_rows < config.batch_size:
        raise ConfigError(
            f"batch_size = {config.batch_size}: split {config.split!r} of {config.data} has {num_rows} rows to train "
            "on; lower it"
        )
    return max(1, round(config.epochs * num_rows / config.batch_size))


def describe(config: WarmupConfig) -> str:
    """What a dry run prints below the settings. Raises `ConfigError` for fewer rows than a batch."""
    return "\n".join([*_step_lines(config), *_size_lines(config)])


def _step_lines(config: WarmupConfig) -> Iterator[str]:
    ranks, learner = config.learner.num_ranks, config.learner
    share = f"{config.batch_size / ranks:g} a rank" if ranks > 1 else "1 rank"
    try:
        counts = read_manifest(config.data)["counts"]["splits"]
    except DatasetError as error:
        yield f"Steps: unknown yet ({error})"
        return
    if config.split not in counts:
        yield f"Steps: unknown; {config.split!r} is none of the splits {', '.join(map(repr, sorted(counts)))}"
        return
    rows = round(counts[config.split]["accepted"] * (1 - config.eval_share))
    steps = num_steps(config, rows)
    about = "about " if config.eval_share else ""
    yield f"Steps: {about}{steps} = {config.epochs:g} epochs of {rows} rows in batches of {config.batch_size} ({share})"
    rates = [
        f"{_rate(learner, step, steps):.2g} at step {step + 1}"
        for step in sorted({0, int(learner.warmup_share * steps), steps // 2, steps - 1})
    ]
    yield f"  learning rate: {learner.lr_schedule}, {', '.join(rates)}"
    if config.eval_share:
        held_back = counts[config.split]["accepted"] - rows
        yield f"  evaluation: about {held_back} rows every {config.eval_every} steps; the best policy is kept"


def _rate(learner: LearnerConfig, step: int, steps: int) -> float:
    return learning_rate(
        step,
        steps,
        peak=learner.learning_rate,
        schedule=learner.lr_schedule,
        warmup_share=learner.warmup_share,
    )


def _size_lines(config: WarmupConfig) -> Iterator[str]:
    shape, source = find_shape(config.policy)
    if shape is None:
        yield f"Memory: no estimate ({source})"
        return
    memory = learner_memory(shape, config.learner, holds_reference=False)
    yield from learner_lines(shape, source, config.learner, memory)
