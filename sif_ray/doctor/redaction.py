"""Secrets are never shown: whatever a check says, their values are taken out of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from sif_ray.secret_names import looks_secret

HIDDEN = "<hidden>"
SHORTEST_GUESSED, SHORTEST_NAMED = 8, 4  # characters; shorter values are words that texts have anyway

_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def secrets_in(environ: Mapping[str, str], named: Collection[str] = ()) -> tuple[str, ...]:
    """The values to hide, longest first: of variables that a configuration names as keys, and of those whose name says
    that they hold one."""
    found: set[str] = set()
    for name, value in environ.items():
        if name in named or looks_secret(name):
            shortest = SHORTEST_NAMED if name in named else SHORTEST_GUESSED
            found.update(part for part in _parts(value) if len(part) >= shortest)
    return tuple(sorted(found, key=len, reverse=True))


def _parts(value: str) -> Iterator[str]:
    """The value as it may appear in a message: whole, without blanks or quotes around it, its lines and words."""
    for text in (value, *value.splitlines()):
        yield from (text, text.strip(), text.strip().strip("'\""))
        yield text.rpartition(":")[2].strip()  # of a line `holder: key`
    yield from (word for word in value.split() if len(word) >= SHORTEST_GUESSED)


def hide(text: str, secrets: Collection[str]) -> str:
    """`text` without `secrets`, and without the users and passwords in its URLs."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _USER_IN_URL.sub(f"{HIDDEN}@", text)
