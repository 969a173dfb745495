"""What is evaluated: a held-out split of a dataset with its controls, or a benchmark of the paper."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from sif_ray.config import BenchmarkConfig, ConfigError, EvaluateConfig
from sif_ray.datagen import pictures
from sif_ray.datagen.dataset import read_samples
from sif_ray.datagen.pictures import PhotoError
from sif_ray.evaluate.answers import content_hash
from sif_ray.evaluate.arms import Arm, arms
from sif_ray.evaluate.benchmarks import BENCHMARKS, choose
from sif_ray.evaluate.benchmarks.item import Benchmark, Item
from sif_ray.evaluate.controls import donors, shown_images
from sif_ray.evaluate.question import Key, Question
from sif_ray.records import Sample
from sif_ray.storage import Folder
from sif_ray.toyworld import benchmarks as toy

TOY = "toy"  # as annotations of a benchmark: rendered scenes in the layout of its files

ANNOTATIONS = (".json", ".jsonl", ".tsv", ".parquet")
READERS = 8  # pictures that are opened at once: those of an object store come late, not slowly


class Task(Protocol):
    """Items to be answered in several arms. Pickled without what it has read, it reads that again where it is."""

    name: str

    @property
    def estimates_depth(self) -> bool:
        """Whether any question needs a depth image that does not come with it."""

    def keys(self) -> list[Key]:
        """Every answer that is wanted, in order."""

    def questions(self, wanted: Collection[Key]) -> Iterator[Question]:
        """What is asked for these answers, streamed."""

    def origin(self) -> dict[str, Any]:
        """What the questions follow from: answers to others are not mixed with theirs."""


class HeldoutTask:
    """The samples of a split, in every arm of the configuration."""

    def __init__(self, config: EvaluateConfig) -> None:
        """Raises `ConfigError` for a split that cannot be evaluated."""
        self.name = config.split
        self._config = config
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "samples"}

    estimates_depth = False

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """In the order of the dataset."""
        return read_samples(self._config.data, self._config.split)

    def keys(self) -> list[Key]:
        return [
            Key(self.name, arm.name, draw, sample.sample_id)
            for sample in self.samples
            for arm in arms(self._config)
            for draw in range(arm.draws)
        ]

    def questions(self, wanted: Collection[Key]) -> Iterator[Question]:
        given = donors(self.samples, self._config.seed)
        for (sample, donor), arm in itertools.product(zip(self.samples, given, strict=True), arms(self._config)):
            photo, *depth = shown_images(sample, donor, arm.control, self._config.prompt.depth_image)
            for draw in range(arm.draws):
                asked = Question(
                    *Key(self.name, arm.name, draw, sample.sample_id),
                    text=sample.question,
                    photo=photo,
                    depth_image=b"".join(depth),
                    temperature=arm.temperature,
                    with_depth_words=self._config.prompt.with_depth_words,
                )
                if asked.key in wanted:
                    yield asked

    def origin(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.sample_id}\n{sample.question}\n".encode())
            digest.update(hashlib.sha256(sample.image).digest() + hashlib.sha256(sample.depth_image).digest())
        return {"samples": digest.hexdigest()[:16]}

    def _check(self) -> None:
        data, samples = self._config.data, self.samples
        if unanswered := [sample.sample_id for sample in samples if not sample.answer.strip()]:
            raise ConfigError(f"data = {data}: {len(unanswered)} rows have no answer to compare, e.g. {unanswered[0]}")
        if flat := [sample.sample_id for sample in samples if not sample.depth_image]:
            raise ConfigError(f"data = {data}: {len(flat)} rows have no depth image to score with, e.g. {flat[0]}")
        if len({sample.scene_id for sample in samples}) < 2:
            raise ConfigError(
                f"split = {self._config.split!r}: one scene only; the blind control needs the images of a second"
            )


class BenchmarkTask:
    """A benchmark's published files, in the arms without a control."""

    def __init__(self, name: str, config: BenchmarkConfig, settings: EvaluateConfig) -> None:
        """Raises `ConfigError` for files that are not there or wrong."""
        self.name = name
        self._config, self._settings = config, settings
        if config.shuffle and not self.benchmark.shuffled:
            possible = ", ".join(name for name, known in BENCHMARKS.items() if known.shuffled)
            raise ConfigError(f"benchmarks.{name}.shuffle: the order of options is given; only in {possible} it is not")
        if not self.items:
            raise ConfigError(
                f"benchmarks.{name}.max_items = {config.max_items}: every image has more questions than this; raise it"
            )
        if unlabelled := [item.item_id for item in self.items if not item.has_truth]:
            raise ConfigError(
                f"benchmarks.{name}.annotations = {config.annotations}: {len(unlabelled)} of {len(self.items)} "
                f"questions have no answer to score with, e.g. id {unlabelled[0]!r}. {self.benchmark.obtain}"
            )
        first = list(itertools.islice(self._read(pictures=True), READERS))
        if not any(map(self._encoded, first)):
            raise ConfigError(
                f"benchmarks.{name}.images = {config.images!r}: no image of the first {len(first)} questions is below "
                f"it, e.g. {first[0].image!r}. {self.benchmark.obtain}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "items"}

    @property
    def benchmark(self) -> Benchmark:
        """What reads and scores it."""
        return choose(self._config.name, Path(self._config.annotations))

    @functools.cached_property
    def items(self) -> list[Item]:
        """Without their pictures. With `max_items` those of randomly drawn images: pairs of questions stay together."""
        items = list(self._read())
        if not self._config.max_items:
            return items
        drawn: set[tuple[str, str]] = set()
        room = self._config.max_items
        sizes = Counter((item.category, item.scene_id) for item in items)
        for scene in sorted(sizes, key=lambda scene: _rank(self._settings.seed, "/".join(scene))):
            if sizes[scene] <= room:
                drawn.add(scene)
                room -= sizes[scene]
        return [item for item in items if (item.category, item.scene_id) in drawn]

    def keys(self) -> list[Key]:
        return [
            Key(self.name, arm.name, draw, item.item_id)
            for item in self.items
            for arm in self.arms
            for draw in range(arm.draws)
        ]

    @property
    def estimates_depth(self) -> bool:
        return self._settings.prompt.depth_image and any(not item.plain for item in self.items)

    @property
    def arms(self) -> Sequence[Arm]:
        """Greedy and sampled: no benchmark has an image to spare for a control."""
        return [arm for arm in arms(self._settings) if arm.control == "none"]

    def questions(self, wanted: Collection[Key]) -> Iterator[Question]:
        ids = {key.item_id for key in wanted}
        items = (item for item in self._read(pictures=True) if item.item_id in ids)
        with ThreadPoolExecutor(READERS) as pool:
            while some := list(itertools.islice(items, READERS)):
                for asked in pool.map(self._question, some):
                    for arm in self.arms:
                        for draw in range(arm.draws):
                            found = replace(asked, arm=arm.name, draw=draw, temperature=arm.temperature)
                            if found.key in wanted:
                                yield found

    def origin(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark.name,
            "annotations": content_hash(Path(self._config.annotations), ANNOTATIONS),
        } | ({"shuffled": self._settings.seed} if self._config.shuffle else {})

    def _read(self, *, pictures: bool = False) -> Iterator[Item]:
        answers = Path(self._config.answers) if self._config.answers else None
        return self.benchmark.items(Path(self._config.annotations), answers, pictures=pictures)

    def _question(self, item: Item) -> Question:
        asked = Question(self.name, "", 0, item.item_id, self._text(item), plain=item.plain)
        if item.num_images > 1:
            return replace(asked, refusal="several_images")
        encoded = self._encoded(item)
        if not encoded:
            return replace(asked, refusal="image_missing")
        try:
            return replace(asked, photo=pictures.read(encoded).encoded)
        except PhotoError as error:
            return replace(asked, refusal=error.reason)

    def _text(self, item: Item) -> str:
        if not (self._config.shuffle and self.benchmark.shuffled):
            return item.question
        return self.benchmark.shuffled(item, random.Random(f"{self._settings.seed}/{item.item_id}"))

    def _encoded(self, item: Item) -> bytes:
        """The item's photograph, in its annotation or in the folder; b"" where it is in neither."""
        if found := item.picture and item.picture():
            return found
        if not (item.image and self._config.images):
            return b""
        try:
            return Folder.open(self._config.images, f"benchmarks.{self.name}.images").read(item.image)
        except FileNotFoundError:
            return b""


def make_tasks(config: EvaluateConfig) -> list[HeldoutTask | BenchmarkTask]:
    """The tasks of a configuration; the files of toy variants are written below its output. Raises `ConfigError`."""
    found: list[HeldoutTask | BenchmarkTask] = [HeldoutTask(config)] if config.data else []
    for name, benchmark in config.benchmarks.items():
        if benchmark.name not in BENCHMARKS:
            raise ConfigError(
                f"benchmarks.{name}.name = {benchmark.name!r}: sif-ray eval list knows {', '.join(BENCHMARKS)}"
            )
        if benchmark.annotations == TOY:
            benchmark = _toy_variant(name, benchmark, config)
        found.append(BenchmarkTask(name, benchmark, config))
    return found


def _toy_variant(name: str, benchmark: BenchmarkConfig, config: EvaluateConfig) -> BenchmarkConfig:
    if benchmark.name not in toy.LAYOUTS:
        raise ConfigError(
            f"benchmarks.{name}.annotations = {TOY!r}: {benchmark.name} has no toy variant; these have one: "
            f"{', '.join(toy.LAYOUTS)}"
        )
    annotations, images = toy.write(benchmark.name, Path(config.output) / "toy" / benchmark.name)
    return replace(benchmark, annotations=str(annotations), images=str(images))


def _rank(seed: int, item_id: str) -> bytes:
    return hashlib.blake2b(f"{seed} {item_id}".encode(), digest_size=8).digest()
