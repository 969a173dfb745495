"""Which environment variables hold secrets, by their names."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(KEY|KEYS|TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|CREDENTIALS)(\W|_|$)")
_ABOUT_A_SECRET = re.compile(r"_(PATH|FILE|DIR|MODE|ENV)$")


def looks_secret(name: str) -> bool:
    """Whether the value of a variable of this name must be shown to nobody: a word of it ends with KEY, TOKEN and the
    like (`PGPASSWORD`, `AWS_ACCESS_KEY_ID`), and it is not a file's path or a mode."""
    upper = name.upper()
    return _SECRET.search(upper) is not None and _ABOUT_A_SECRET.search(upper) is None
