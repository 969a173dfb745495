"""Answers on disk: written as they come, so that a run that was killed asks for no answer twice.

What could not be asked is not written: the next run tries it again.

answers/<policy>/<task>/origin.json        what the questions and answers follow from
answers/<policy>/<task>/greedy.jsonl       {"id", "text", "tokens"} a line: what `sif-ray eval score` reads
answers/<policy>/<task>/sampled_T1.0.2.jsonl   the third draw of an arm that has several
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

from sif_ray.config import ConfigError
from sif_ray.evaluate.question import Answer, Key
from sif_ray.observe import jsonl
from sif_ray.observe.run_folder import write_json

ORIGIN = "origin.json"


def content_hash(path: Path, suffixes: Collection[str] = ()) -> str:
    """A hash of a file, or of the names and contents of a folder's files (those with `suffixes`, () = all)."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not suffixes or file.suffix in suffixes:
            digest.update(file.relative_to(path if path.is_dir() else path.parent).as_posix().encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


class Answers:
    """The answers of one policy to one task.

    Example: `Answers(Path("runs/evaluate/answers/grpo"), "vstar", origin).add(answer)`.
    """

    def __init__(self, folder: Path, task: str, origin: dict[str, Any], *, resume: bool = True) -> None:
        """Open the answers below `folder`. Raises `ConfigError` where they are of another `origin`; without `resume`
        those are removed."""
        self._folder, self._task = folder / task, task
        if not resume:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check(origin)
        self._files: dict[str, TextIO] = {}

    def known(self, keys: list[Key]) -> dict[Key, Answer]:
        """The answers that are there, of these."""
        wanted = set(keys)
        found: dict[Key, Answer] = {}
        for arm, draw in dict.fromkeys((key.arm, key.draw) for key in keys):
            path = self._path(arm, draw)
            for line in jsonl.read(path) if path.exists() else []:
                answer = Answer(self._task, arm, draw, line["id"], line["text"], line["tokens"])
                if answer.key in wanted:
                    found[answer.key] = answer
        return found

    def add(self, answer: Answer) -> None:
        """Append one answer; it is in the file when this returns."""
        if answer.refusal:
            return
        path = self._path(answer.arm, answer.draw)
        if path.name not in self._files:
            self._files[path.name] = jsonl.open_for_append(path)
        line = {"id": answer.item_id, "text": answer.text, "tokens": answer.num_tokens}
        self._files[path.name].write(jsonl.to_line(line))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _path(self, arm: str, draw: int) -> Path:
        return self._folder / (f"{arm}.{draw}.jsonl" if draw else f"{arm}.jsonl")

    def _check(self, origin: dict[str, Any]) -> None:
        path = self._folder / ORIGIN
        plain = json.loads(json.dumps(origin))
        with contextlib.suppress(FileNotFoundError):
            found = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in plain if plain[key] != found.get(key)]
            if changed:
                key = changed[0]
                raise ConfigError(
                    f"{self._folder} holds answers with another {key}: {found.get(key)!r:.200} there, "
                    f"{plain[key]!r:.200} now; choose another output, or remove them with resume=false"
                )
        write_json(path, plain)
