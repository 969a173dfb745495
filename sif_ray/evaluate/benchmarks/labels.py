"""Labels of the benchmarks whose published question files hold none, or not for every split."""

from __future__ import annotations

from sif_ray.evaluate.benchmarks.files import Row

INLINE = "A question file may also hold them itself, as the field label or answer."


def label_of(row: Row, listed: object, allowed: tuple[str, ...] = ()) -> str:
    """The label that the row holds itself, else the `listed` one; "" where there is none, so it can only be asked.

    Raises `ConfigError` for a label that is not `allowed` (() = any text).
    """
    inline = (row.text(field) for field in ("label", "answer") if row.has(field))
    label = next(inline, listed)
    if label is None:
        return ""
    if not isinstance(label, str) or (allowed and label not in allowed):
        raise row.error("answer", f"is {label!r:.80}; expected {f'one of {allowed}' if allowed else 'a text'}")
    return label
