"""Annotation files of every benchmark in the layout it is published in, and outputs in the policy's form."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sif_ray.evaluate.benchmarks import BENCHMARKS
from sif_ray.evaluate.benchmarks.item import Benchmark, Item, Reply
from sif_ray.evaluate.measure import sample_all

SAMPLES = Path(__file__).parents[2] / "../shared/samples"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real rows beside this checkout")


def output(answer: str | None, *boxes: Sequence[float]) -> str:
    """A trace that ends on `boxes`; None = without an answer block."""
    area = json.dumps([{"bbox_2d": list(box), "depth": 0.5} for box in boxes])
    think = f"<think><area>{area}</area>\n<text>Here.</text></think>" if boxes else "<think></think>"
    return think if answer is None else f"{think}\n<answer>{answer}</answer>"


def replies(benchmark: Benchmark, path: Path, texts: Sequence[str], answers: Path | None = None) -> list[Reply]:
    return [Reply(item, text) for item, text in zip(benchmark.items(path, answers), texts, strict=True)]


def headline(benchmark: str, found: Sequence[Reply], group: str = "overall", measure: int = 0) -> tuple[float, float]:
    """Strict and published."""
    chosen = BENCHMARKS[benchmark].measure(found)[measure]
    sampled = sample_all(chosen, 10, 0)
    return sampled["strict"][group].value, sampled["published"][group].value


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def photo() -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(encoded, "PNG")
    return encoded.getvalue()


# ------------------------------------------------------------------------------------------ one file of each


def viscot(folder: Path, name: str = "gqa") -> Path:
    turns = [
        "<image>\nWhat is it? Please provide the bounding box coordinate of the region that can help you answer the "
        "question better.",
        "[0.1, 0.2, 0.3, 0.4]",
        "<image>",
        "A cup",
    ]
    speakers = ("human", "gpt") * 2
    row = {
        "dataset": name,
        "split": "val",
        "question_id": 7,
        "image": [f"cot/{name}/1.jpg", f"cot/{name}/1.jpg###[1, 2, 3, 4]"],
        "conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=True)],
    }
    return write_json(folder / f"{name}.json", [row, {**row, "question_id": 9}])


def boxes(path: Path, rows: Sequence[tuple[Sequence[float], int, int]], own_id: str = "sent_id") -> Path:
    """Visual-CoT's layout of detection and RefCOCO files; of each row box in pixels, width and height."""
    return write_lines(
        path,
        [
            {
                "img_path": f"{number}.jpg",
                "expression": "the red cup",
                "bbox": list(box),
                "width": width,
                "height": height,
                own_id: 100 + number,
                "split": "val",
            }
            for number, (box, width, height) in enumerate(rows)
        ],
    )


def spatialbench(folder: Path, category: str, answers: Sequence[str]) -> Path:
    rows = [
        {"image": f"{category}/{number}.jpg", "question": "How is it?", "answer": answer, "id": f"{category}_{number}"}
        for number, answer in enumerate(answers)
    ]
    return write_json(folder / f"{category}.json", rows)


def sat(path: Path, rows: Sequence[tuple[Sequence[str], str, int]]) -> Path:
    """Of each row choices, right answer and number of images."""
    return write_parquet(
        path,
        [
            {
                "image_bytes": [{"bytes": photo(), "path": None}] * num_images,
                "question": "Where is it? ",
                "answers": list(choices),
                "question_type": "obj_movement",
                "correct_answer": right,
            }
            for choices, right, num_images in rows
        ],
    )


def vstar(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """Of each row category and label."""
    text = "What is the colour of the cup?\n(A) red\n(B) blue\n(C) green\n(D) white\nAnswer with the option's letter."
    return write_lines(
        path,
        [
            {
                "image": f"{category}/{number}.jpg",
                "text": text,
                "category": category,
                "label": label,
                "question_id": f"q{number}",
            }
            for number, (category, label) in enumerate(rows)
        ],
    )


def cvbench(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Of each row source, task and answer such as "(A)"."""
    found = [
        {
            "idx": 10 + number,
            "type": "3D" if source == "Omni3D" else "2D",
            "task": task,
            "question": "How many cups?",
            "choices": ["10", "1", "2"],
            "answer": answer,
            "prompt": "How many cups? Select from the following choices.\n(A) 10\n(B) 1\n(C) 2",
            "filename": f"img/{number}.png",
            "source": source,
        }
        for number, (source, task, answer) in enumerate(rows)
    ]
    return write_parquet(path, found) if path.suffix == ".parquet" else write_lines(path, found)


def ovdeval(folder: Path, name: str = "color") -> Path:
    content = {
        "categories": [{"supercategory": "object", "id": 0, "name": "red cup"}, {"id": 1, "name": "blue cup"}],
        "annotations": [
            {"id": 0, "bbox": [10, 20, 30, 40], "category_id": 0, "image_id": 5, "iscrowd": 0, "area": 1200},
            {"id": 1, "bbox": [50, 20, 40, 40], "category_id": 1, "image_id": 6, "iscrowd": 0, "area": 1600},
        ],
        "images": [
            {"file_name": "a.jpg", "id": 5, "width": 100, "height": 200, "text": ["red cup"], "neg_text": ["blue cup"]},
            {"file_name": "b.jpg", "id": 6, "width": 200, "height": 100, "text": ["blue cup"], "neg_text": ["red cup"]},
        ],
    }
    return write_json(folder / f"{name}.json", content)


def bunny(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """SpatialBot's layout of the general benchmarks."""
    common = {"question_id": 1, "image": "a.jpg", "text": "Is it?\nAnswer the question using a single word or phrase."}
    return write_lines(path, [{**common, "category": "default", "question_id": n, **row} for n, row in enumerate(rows)])


def mmbench(path: Path, answers: Sequence[str]) -> Path:
    image = base64.b64encode(photo() * 2000).decode()  # longer than the csv module's own limit
    with path.open("w", encoding="utf-8", newline="") as file:
        names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
        rows = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        rows.writeheader()
        for number, answer in enumerate(answers):
            row = {"index": 50 + number, "question": "Which?", "A": "red", "B": "blue", "C": "green", "answer": answer}
            rows.writerow({**row, "category": "attribute", "image": image, "hint": "Look closely." if number else ""})
    return path


def mmmu(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    """Of each row kind, options as Python text and answer."""
    found = [
        {
            "id": f"validation_Art_Theory_{number}",
            "question": "Which <image 1>?",
            "options": options,
            "answer": answer,
            "question_type": kind,
            "image_1": {"bytes": photo(), "path": None},
        }
        for number, (kind, options, answer) in enumerate(rows, 1)
    ]
    return write_parquet(path, found)


def items_of(name: str, path: Path, answers: Path | None = None) -> list[Item]:
    return list(BENCHMARKS[name].items(path, answers))
