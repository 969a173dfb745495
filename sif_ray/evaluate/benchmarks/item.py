"""What a benchmark asks, what came back, and what a benchmark is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sif_ray.config import ConfigError
from sif_ray.evaluate.measure import Measure
from sif_ray.method.boxes import Box


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Example: `Item("7", "gqa", "cot/gqa/2316539.jpg", "What are the tree branches in front of?", "window")`.
    """

    item_id: str  # unique in the benchmark
    category: str  # what the tables are made by
    image: str  # its name below the benchmark's folder of images; "" = the annotation file holds it
    question: str  # the text that the policy is asked, without the words about the reply's form
    answer: str = ""  # the truth; "" where it is a box
    answers: tuple[str, ...] = ()  # of the people who were asked (VQAv2)
    choices: tuple[str, ...] = ()
    task: str = ""  # what a second table is made by; "" = there is none
    labels: tuple[str, ...] = ()  # of the objects to detect, those that are not there included
    boxes_xyxy_px: tuple[Box, ...] = ()  # the truth
    box_labels: tuple[str, ...] = ()  # of the true boxes, where there are labels
    width: int = 0  # px; 0 = not stated
    height: int = 0  # px
    num_images: int = 1
    picture: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    """Decodes the image that the annotation file holds; None where it holds none, or none is asked for."""
    plain: bool = False  # asked directly: photo and question alone

    @property
    def scene_id(self) -> str:
        """Items of one scene are drawn together by the bootstrap."""
        return self.image or self.item_id

    @property
    def has_truth(self) -> bool:
        """Whether it can be scored; the questions of some splits are published without answers."""
        return bool(self.answer or self.answers or self.labels or self.boxes_xyxy_px)


@dataclass(frozen=True)
class Reply:
    """An item and what the policy wrote; "" where it wrote nothing."""

    item: Item
    text: str
    verdict: float | None = None  # of the judge, in [0, 1]; None = it has none on this reply


Reader = Callable[[Path, Path | None], Iterator[Item]]
"""Streams one annotation file; the second path is where the labels are, if not in it. Raises `ConfigError`."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its files, how they are read and how replies are scored."""

    name: str
    summary: str
    obtain: str  # what to put where, how large it is, and who may have it
    conventions: str  # how the strict and the published score differ
    read: Reader
    measure: Callable[[Sequence[Reply]], list[Measure]]  # the headline first
    readable: Callable[[Reply], bool]  # whether the strict reading finds an answer in the text
    files: tuple[str, ...] = ()  # names of its annotation files below a folder; () = it has a single file
    labels: str = ""  # where the labels are if not in the annotations; "" = always in them
    shuffled: Callable[[Item, random.Random], str] | None = None
    """The question with its options in another order; None where the order is part of the benchmark."""
    judged: bool = False  # whether a judge says how good an answer is

    def items(self, annotations: Path, answers: Path | None = None, *, pictures: bool = False) -> Iterator[Item]:
        """Every item of an annotation file, or of all in a folder, where ids become `<category>/<id>`.

        Without `pictures` those that the file holds are left out, so that a list of all items stays small.

        An own id that comes again (MME asks twice about an image) gets "#2", "#3", ... Raises `ConfigError`.
        """
        if answers is not None and not self.labels:
            raise ConfigError(f"--answers {answers}: {self.name} has its answers in its annotations; leave it out")
        if answers is not None and not answers.exists():
            raise ConfigError(f"--answers {answers}: no such file or folder; expected {self.labels}")
        seen: Counter[str] = Counter()
        for path in self._paths(annotations):
            for item in self.read(path, answers):
                own = f"{item.category}/{item.item_id}" if annotations.is_dir() else item.item_id
                seen[own] += 1
                yield replace(item, item_id=numbered(own, seen[own]), picture=item.picture if pictures else None)

    def _paths(self, annotations: Path) -> list[Path]:
        if not annotations.exists():
            raise ConfigError(f"--annotations {annotations}: no such file or folder. {self.obtain}")
        if annotations.is_file():
            return [annotations]
        found = [annotations / name for name in self.files if (annotations / name).is_file()]
        if not found:
            wanted = f"none of {', '.join(self.files)} is in it" if self.files else "name its annotation file"
            raise ConfigError(f"--annotations {annotations} is a folder; {wanted}. {self.obtain}")
        return found


def numbered(own_id: str, occurrence: int) -> str:
    """The id of the n-th item, or prediction, with the same own id."""
    return own_id if occurrence == 1 else f"{own_id}#{occurrence}"
