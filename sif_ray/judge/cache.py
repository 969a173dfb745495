"""Scores that were paid for, on disk."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

LOCK_TIMEOUT_S = 30.0


class ScoreCache:
    """{key: score} in an SQLite file, shared by reward workers and by runs one after the other.

    Each call opens the file anew, so any thread or process may make it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")

    def get(self, key: str) -> float | None:
        """The score under `key`, None when there is none."""
        rows = self._execute("SELECT score FROM scores WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, score: float) -> None:
        """Keep `score`, unless another worker was faster."""
        self._execute("INSERT OR IGNORE INTO scores VALUES (?, ?)", key, score)

    def _execute(self, statement: str, *values: str | float) -> list[tuple[float]]:
        with contextlib.closing(sqlite3.connect(self._path, timeout=LOCK_TIMEOUT_S)) as db, db:
            return db.execute(statement, values).fetchall()
