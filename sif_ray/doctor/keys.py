"""Variables that hold keys: whether they are there and can be right. Their values are never shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sif_ray.doctor.finding import Finding, fault, ok


def key_findings(field: str, variable: str, environ: Mapping[str, str], *, lines: bool = False) -> Iterator[Finding]:
    """`field` is the key of the configuration that names `variable`. `lines`: it has several keys, a line each."""
    check = f"key: {variable}"
    value = environ.get(variable)
    where = "in the environment of Ray on every node (runtime_env env_vars, or a secret of the pods)"
    if value is None:
        yield fault(check, f"{field} names it, and it is not set", f"set it {where}")
        return
    if not value.strip():
        yield fault(check, "it is empty", f"put the key into it, {where}")
        return
    if wrong := "" if lines else _wrong(value):
        yield fault(check, wrong, "paste the key again, alone: export NAME=$(cat FILE) takes the line's end off")
    else:
        yield ok(check, "set")


def _wrong(value: str) -> str:
    if value != value.strip():
        what = "line break" if value.strip("\r\n") != value else "blank"
        return f"a {what} stands before or behind the key: the server will refuse it"
    if value[0] in "'\"" or value[-1] in "'\"":
        return "the key stands in quotes, which would be sent with it"
    if not value.isascii() or any(character.isspace() or not character.isprintable() for character in value):
        return "the key has a blank, a line break or a letter that no header can carry"
    return ""
