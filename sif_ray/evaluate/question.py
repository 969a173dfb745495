"""What a policy is asked and what it wrote, as they travel between processes: no truth is among it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from sif_ray.config import PromptConfig
from sif_ray.method.prompts import user_content

PLAIN_SYSTEM = "You are a helpful assistant."
"""System message of what is asked without a depth image and without the thinking (method.md section 6.8)."""


class Key(NamedTuple):
    """Which answer: `Key("heldout", "greedy", 0, "toy-7-color")`."""

    task: str
    arm: str
    draw: int
    item_id: str

    def seed(self, run_seed: int) -> int:
        """Of this answer alone, so that it does not depend on what else is asked."""
        digest = hashlib.blake2b(f"{run_seed} {self.item_id} {self.draw}".encode(), digest_size=4).digest()
        return int.from_bytes(digest) >> 1


@dataclass(frozen=True)
class Question:
    """One thing that a policy is asked.

    Example: `Question("vstar", "greedy", 0, "7", "What colour is the cup? (A) red (B) blue", photo=b"\\x89PNG...")`.
    """

    task: str
    arm: str
    draw: int
    item_id: str
    text: str  # without the words about the reply's form
    photo: bytes = b""  # encoded
    depth_image: bytes = b""  # encoded pseudo-colours; b"" = estimated where the prompt shows them
    plain: bool = False  # asked directly: photo and text alone
    with_depth_words: bool = False  # of the suffix; without them in the paper's benchmarks
    temperature: float = 0.0
    refusal: str = ""  # why it cannot be asked, a stable word

    @property
    def key(self) -> Key:
        return Key(self.task, self.arm, self.draw, self.item_id)

    def shows_depth(self, prompt: PromptConfig) -> bool:
        """Whether the policy sees a depth image with it."""
        return prompt.depth_image and not self.plain

    def images(self, prompt: PromptConfig) -> tuple[bytes, ...]:
        """The encoded images of its messages, in order."""
        return (self.photo, self.depth_image) if self.shows_depth(prompt) else (self.photo,)

    def messages(self, prompt: PromptConfig) -> list[dict[str, Any]]:
        """Chat messages as the paper's scripts ask: with the thinking, or plainly."""
        if self.plain:
            content = [{"type": "image"}, {"type": "text", "text": self.text}]
            return [{"role": "system", "content": PLAIN_SYSTEM}, {"role": "user", "content": content}]
        content = user_content(self.text, depth_image=prompt.depth_image, with_depth_words=self.with_depth_words)
        return [{"role": "user", "content": content}]


@dataclass(frozen=True)
class Answer:
    """What a policy wrote: `Answer("vstar", "greedy", 0, "7", "<think>...", 112)`."""

    task: str
    arm: str
    draw: int
    item_id: str
    text: str = ""
    num_tokens: int = 0
    refusal: str = ""  # why there is no text, a stable word

    @property
    def key(self) -> Key:
        return Key(self.task, self.arm, self.draw, self.item_id)


_ARROW = {"str": pa.string(), "bytes": pa.binary(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}


def _schema(record: type[Any]) -> pa.Schema:
    return pa.schema([(name, _ARROW[kind]) for name, kind in record.__annotations__.items()])


QUESTION_SCHEMA = _schema(Question)
ANSWER_SCHEMA = _schema(Answer)

Record = TypeVar("Record", Question, Answer)


def pack(records: Iterable[Record], schema: pa.Schema) -> pa.Table:
    """Records of `QUESTION_SCHEMA` or `ANSWER_SCHEMA` as a table with one row, "batch"."""
    rows = [asdict(record) for record in records]
    return pa.table({"batch": pa.array([rows], pa.list_(pa.struct(list(schema))))})


def unpack(table: pa.Table) -> list[Question]:
    """The questions of `pack`."""
    [rows] = table["batch"].to_pylist()
    return [Question(**row) for row in rows]
