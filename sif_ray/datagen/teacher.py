"""The template teacher: one short sentence per forward frame, then the answer (paper: "forward inference").

It needs no model and no key. The sentences use a small fixed vocabulary, so that a tiny policy with a tokenizer of its
own can learn them; `VOCABULARY_SENTENCES` lists the fixed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from sif_ray.method.boxes import Box
from sif_ray.method.trace import AreaBox, Step, Trace

WHOLE_IMAGE = "Look at the whole image."
ELSEWHERE = "Not here."
ONE_PART = "They are in this part."
CLOSER_LOOK = "Look closer."

VOCABULARY_SENTENCES = (WHOLE_IMAGE, ELSEWHERE, ONE_PART, CLOSER_LOOK, "Here is the", "Here are the", " and the")
"""Every word that the teacher adds to the names of the objects and to numbers."""

_IRREGULAR = {"person": "people"}
_TOLERANCE = 2e-3  # boxes are rounded to three decimals: a cover may fall short by that much


def write_trace(areas: Sequence[Sequence[AreaBox]], names: Sequence[str], answer: str, decimals: int) -> str:
    """The trace over `areas`, the forward frames with the depth of their boxes, in the SIF grammar.

    The boxes must have no more than `decimals` decimals, so that the stated depth is that of the stated box. Raises
    `TraceError` for words that are no trace (an answer with a tag, say).
    """
    sentences = frame_sentences([[box.bbox_2d for box in area] for area in areas], names)
    steps = (Step(tuple(area), sentence) for area, sentence in zip(areas, sentences, strict=True))
    return Trace(tuple(steps), answer).render(decimals)


def frame_sentences(frames: Sequence[Sequence[Box]], names: Sequence[str]) -> list[str]:
    """One sentence per forward frame (boxes are bbox_xyxy_norm); the last frame holds the evidence, named by `names`.

    `names` has one name per evidence box, without an article, e.g. `("red ball", "blue box")`.
    """
    evidence = frames[-1]
    if len(evidence) != len(names):
        raise ValueError(f"names ({len(names)}) must name every evidence box ({len(evidence)})")
    if len(frames) == 1:  # the evidence fills the image
        return [evidence_sentence(names)]
    middle = [_sentence(frame, evidence) for frame in frames[1:-1]]
    return [WHOLE_IMAGE, *middle, evidence_sentence(names)]


def evidence_sentence(names: Sequence[str]) -> str:
    """E.g. "Here is the red ball.", "Here is the red ball and the blue box.", "Here are the 3 balls."."""
    if len(names) > 1 and len(set(names)) == 1:
        return f"Here are the {len(names)} {plural(names[0])}."
    return f"Here is the {' and the '.join(names)}."


def plural(name: str) -> str:
    """The plural of an English object name, e.g. "balls", "boxes", "people"."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def _sentence(frame: Sequence[Box], evidence: Sequence[Box]) -> str:
    if not all(any(_covers(box, target) for box in frame) for target in evidence):
        return ELSEWHERE
    return ONE_PART if len(frame) == 1 and len(evidence) > 1 else CLOSER_LOOK


def _covers(outer: Box, inner: Box) -> bool:
    low = all(outer[i] <= inner[i] + _TOLERANCE for i in (0, 1))
    return low and all(outer[i] >= inner[i] - _TOLERANCE for i in (2, 3))
