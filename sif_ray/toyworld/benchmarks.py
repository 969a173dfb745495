"""Toy variants of benchmarks: rendered scenes and their questions in the layouts of the published files.

They show that reading, asking and scoring fit together. What a tiny policy scores in them says nothing about the
benchmarks, and of most of their wordings it has never seen one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sif_ray.method.boxes import norm_to_pixels
from sif_ray.toyworld.questions import Question, all_questions
from sif_ray.toyworld.render import Rendering, png, render
from sif_ray.toyworld.scenes import COLOURS, SIZE_PX, Scene, make_scene

FIRST_SCENE = 1 << 40  # beside all seeds of datasets and recipes
NUM_SCENES = 64

_LETTERS = "ABCDEF"
_ASK_LETTER = "Answer with the option's letter from the given choices directly."

Rows = list[dict[str, Any]]


class _Look(NamedTuple):
    number: int
    scene: Scene
    rendering: Rendering

    @property
    def image(self) -> str:
        return f"{self.number:04d}.png"

    def questions(self, kind: str) -> list[Question]:
        """At most one of a kind, a different one in every scene."""
        found = all_questions(self.scene)[kind]
        return [found[self.number % len(found)]] if found else []

    def shuffled(self, options: Sequence[str]) -> list[str]:
        order = np.random.default_rng([self.scene.seed, len(options)]).permutation(len(options))
        return [options[index] for index in order]


def write(name: str, folder: Path, num_scenes: int = NUM_SCENES) -> tuple[Path, Path]:
    """Write the toy variant of a benchmark; where its annotations and its images are. Raises `KeyError` without one."""
    layout = LAYOUTS[name]
    looks = [_Look(number, scene, render(scene)) for number, scene in enumerate(_scenes(num_scenes))]
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for look in looks:
        (images / look.image).write_bytes(png(look.rendering.rgb))
    return layout(looks, folder), images


def _scenes(number: int) -> Iterator[Scene]:
    return (make_scene(FIRST_SCENE + index) for index in range(number))


def _viscot(looks: list[_Look], folder: Path) -> Path:
    asked = ((look, question) for look in looks for kind in ("colour", "closer") for question in look.questions(kind))
    rows = [
        {
            "dataset": "toyworld",
            "split": "test",
            "question_id": number,
            "image": [look.image],
            "conversations": [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for number, (look, question) in enumerate(asked)
    ]
    return _json(folder / "toyworld.json", rows)


def _viscot_det(looks: list[_Look], folder: Path) -> Path:
    return _boxes(folder / "toyworld.jsonl", looks, "question_id", lambda look, question: question.text)


def _refcoco(looks: list[_Look], folder: Path) -> Path:
    def named(look: _Look, question: Question) -> str:
        return look.scene.solids[question.evidence[0]].name

    return _boxes(folder / "REC_toyworld_test.jsonl", looks, "sent_id", named)


def _boxes(path: Path, looks: list[_Look], own_id: str, expression: Callable[[_Look, Question], str]) -> Path:
    asked = ((look, question) for look in looks for question in look.questions("colour"))
    rows = [
        {
            "img_path": look.image,
            "expression": expression(look, question),
            "bbox": [float(value) for value in norm_to_pixels(question.boxes(look.rendering)[0], SIZE_PX, SIZE_PX)],
            "width": SIZE_PX,
            "height": SIZE_PX,
            own_id: number,
            "split": "test",
        }
        for number, (look, question) in enumerate(asked)
    ]
    return _lines(path, rows)


def _sat(looks: list[_Look], folder: Path) -> Path:
    rows = [
        {
            "image_bytes": [{"bytes": png(look.rendering.rgb), "path": None}],
            "question": question.text,
            "answers": look.shuffled(_options(look, question)),
            "question_type": kind,
            "correct_answer": question.answer,
        }
        for look in looks
        for kind in ("closer", "side")
        for question in look.questions(kind)
    ]
    return _parquet(folder / "toyworld.parquet", rows)


def _vstar(looks: list[_Look], folder: Path) -> Path:
    rows = []
    for look in looks:
        for category, kind in (("direct_attributes", "colour"), ("relative_position", "side")):
            for question in look.questions(kind):
                options = look.shuffled(_options(look, question))
                listed = "\n".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
                rows.append(
                    {
                        "question_id": len(rows),
                        "image": look.image,
                        "text": f"{question.text}\n{listed}\n{_ASK_LETTER}",
                        "category": category,
                        "label": _LETTERS[options.index(question.answer)],
                    }
                )
    return _lines(folder / "test_questions.jsonl", rows)


def _cvbench(looks: list[_Look], folder: Path) -> Path:
    rows = []
    kinds = (
        ("2D", "COCO", "Count", "count"),
        ("2D", "ADE20K", "Relation", "side"),
        ("3D", "Omni3D", "Depth", "closer"),
    )
    for look, (half, source, task, kind) in itertools.product(looks, kinds):
        for question in look.questions(kind):
            options = look.shuffled(_options(look, question))
            listed = "\n".join(f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False))
            rows.append(
                {
                    "idx": len(rows),
                    "type": half,
                    "task": task,
                    "image": {"bytes": png(look.rendering.rgb), "path": None},
                    "question": question.text,
                    "choices": options,
                    "answer": f"({_LETTERS[options.index(question.answer)]})",
                    "prompt": f"{question.text} Select from the following choices.\n{listed}",
                    "filename": look.image,
                    "source": source,
                }
            )
    return _parquet(folder / "test_toyworld.parquet", rows)


def _spatialbench(looks: list[_Look], folder: Path) -> Path:
    asked: dict[str, list[tuple[_Look, str, str]]] = {"positional": [], "existence": [], "counting": []}
    for look in looks:
        asked["positional"] += [(look, question.text, question.answer) for question in look.questions("side")]
        asked["counting"] += [(look, question.text, question.answer) for question in look.questions("count")]
        asked["existence"] += [(look, text, word.capitalize()) for text, word in _there(look)]
    for category, found in asked.items():
        rows = [
            {"id": f"{category}_{number}", "image": look.image, "question": text, "answer": answer}
            for number, (look, text, answer) in enumerate(found)
        ]
        _json(folder / f"{category}.json", rows)
    return folder


def _pope(looks: list[_Look], folder: Path) -> Path:
    asked = ((look, text, word) for look in looks for text, word in _there(look))
    rows = [
        {"question_id": number, "image": look.image, "text": text, "category": "random", "label": word}
        for number, (look, text, word) in enumerate(asked)
    ]
    return _lines(folder / "toyworld.jsonl", rows)


def _there(look: _Look) -> list[tuple[str, str]]:
    """A question about a solid that is there, and one about the same shape in a colour that is not."""
    solid = look.scene.solids[0]
    colours = {other.colour for other in look.scene.solids}
    absent = next(colour for colour in look.shuffled(COLOURS) if colour not in colours)
    return [(f"Is there a {solid.name}?", "yes"), (f"Is there a {absent} {solid.shape}?", "no")]


def _options(look: _Look, question: Question) -> list[str]:
    """What the answer is chosen from, the answer among it."""
    if question.question_type == "closer":
        return [look.scene.solids[index].name for index in question.evidence]
    if question.question_type == "colour":
        return [question.answer, *[colour for colour in look.shuffled(COLOURS) if colour != question.answer][:3]]
    return {"side": ["left", "right"], "count": ["1", "2", "3"]}[question.question_type]


def _json(path: Path, rows: Rows) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _lines(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _parquet(path: Path, rows: Rows) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


LAYOUTS: dict[str, Callable[[list[_Look], Path], Path]] = {
    "viscot": _viscot,
    "viscot_det": _viscot_det,
    "refcoco": _refcoco,
    "sat": _sat,
    "vstar": _vstar,
    "cvbench": _cvbench,
    "spatialbench": _spatialbench,
    "pope": _pope,
}
"""How each is written: {benchmark: its layout}."""
