"""The frozen records that cross process boundaries.

A dataset row is a `Sample`. One prompt answered G times is a `RolloutGroup` of `Rollout`s; with rewards it is a
`ScoredGroup`, the unit the learner trains on. Dimension suffixes: G rollouts of one prompt, P prompt tokens,
T completion tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sif_ray.method.boxes import Box

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sample:
    """One question about one image: a row of a SIF dataset.

    Example: `Sample(sample_id="toy-7-closer", question="Which is closer, the red ball or the blue box?",
    answer="red ball", boxes=((0.1, 0.2, 0.4, 0.5), (0.6, 0.3, 0.8, 0.6)), width=112, height=112, ...)`.
    """

    sample_id: str
    scene_id: str  # rows of one image share it; the unit of resampling in a bootstrap
    dataset: str
    split: str  # e.g. "warmup", "grpo", "heldout"; "" where the source has none
    question: str
    question_type: str  # "" where the source has none
    answer: str
    boxes: tuple[Box, ...]  # evidence, bbox_xyxy_norm in the image frame
    width: int  # px
    height: int  # px
    image: bytes  # encoded RGB photograph, as it came
    depth_image: bytes  # PNG, Spectral_r pseudo-colour of depth_rel (0 = near, 1 = far)
    depth_source: str  # "measured", "exact" or "estimated:<model>"
    source_frame: str  # frame of the source's boxes before conversion: "pixels", "image" or "padded_square"
    frames: tuple[tuple[Box, ...], ...] = ()  # forward frames, whole image first; () when not made
    trace: str = ""  # assistant text in the SIF grammar; "" when not made
    profile: str = "corrected"

    def prompt_images(self, depth_image: bool) -> tuple[bytes, ...]:
        """The encoded images that a prompt shows: (rgb, depth) or, without `depth_image`, (rgb,)."""
        return (self.image, self.depth_image) if depth_image else (self.image,)


_BOXES = pa.list_(pa.list_(pa.float64()))

SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("scene_id", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("question_type", pa.string()),
        ("answer", pa.string()),
        ("boxes", _BOXES),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),
        ("depth_image", pa.binary()),
        ("depth_source", pa.string()),
        ("source_frame", pa.string()),
        ("frames", pa.list_(_BOXES)),
        ("trace", pa.string()),
        ("profile", pa.string()),
    ]
)
"""Arrow schema of a dataset shard: the fields of `Sample`, in order."""


def sample_to_row(sample: Sample) -> dict[str, Any]:
    """The sample as an Arrow row (lists instead of tuples, no copy of the images)."""
    row = {field.name: getattr(sample, field.name) for field in fields(sample)}
    row["boxes"] = [list(box) for box in sample.boxes]
    row["frames"] = [[list(box) for box in frame] for frame in sample.frames]
    return row


def sample_from_row(row: dict[str, Any]) -> Sample:
    """The inverse of `sample_to_row`; columns that `Sample` does not know are ignored. Raises `RecordError` for a field
    that is null."""
    known = {field.name: row[field.name] for field in fields(Sample)}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise RecordError(f"row {row['sample_id']}: {missing[0]} is null")
    known["boxes"] = _as_boxes(row["boxes"])
    known["frames"] = tuple(_as_boxes(frame) for frame in row["frames"])
    known["width"], known["height"] = int(row["width"]), int(row["height"])
    return Sample(**known)


def _as_boxes(boxes: Any) -> tuple[Box, ...]:
    return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in boxes)


class RecordError(ValueError):
    """A record contradicts itself. Raised where it is made, so that it never travels; the message names the field."""


FINISH_REASONS = ("stop", "length")
LOGPROB_ROUNDING = 1e-4  # above zero: float32 kernels round the log-prob of a certain token to either side of it


@dataclass(frozen=True)
class Rollout:
    """One completion of a prompt, token by token. Raises `RecordError` when its parts contradict each other.

    Example: `version_spans=((3, 40), (4, 15))` says that version 3 wrote the first 40 tokens and version 4 the last 15.
    """

    token_ids_T: IntArray  # (T,), ends with the end-of-sequence token when finish_reason is "stop"
    logprobs_T: FloatArray  # (T,), natural log, at the sampling temperature, from the engine that sampled
    version_spans: tuple[tuple[int, int], ...]  # (policy version, number of tokens), in order; the counts sum to T
    finish_reason: str  # one of FINISH_REASONS
    text: str  # decoded without special tokens

    def __post_init__(self) -> None:
        num_tokens = len(self.token_ids_T)
        if num_tokens == 0 or self.token_ids_T.shape != self.logprobs_T.shape:
            raise RecordError(
                f"token_ids_T has shape {self.token_ids_T.shape} and logprobs_T {self.logprobs_T.shape}; a rollout has "
                "at least one token, and one log-prob for each"
            )
        wrong = ~np.isfinite(self.logprobs_T) | (self.logprobs_T > LOGPROB_ROUNDING)
        if wrong.any():
            first = int(wrong.argmax())
            raise RecordError(f"logprobs_T[{first}] = {self.logprobs_T[first]} is no log-probability")
        if any(version < 0 or count < 1 for version, count in self.version_spans):
            raise RecordError(f"version_spans = {self.version_spans}: a version is 0 or more, a span at least 1 token")
        covered = sum(count for _, count in self.version_spans)
        if covered != num_tokens:
            raise RecordError(f"version_spans = {self.version_spans} cover {covered} of {num_tokens} tokens")
        if self.finish_reason not in FINISH_REASONS:
            raise RecordError(f"finish_reason = {self.finish_reason!r} is not one of {', '.join(FINISH_REASONS)}")


@dataclass(frozen=True)
class RolloutGroup:
    """G rollouts of one prompt. The images travel once, encoded.

    Raises `RecordError` when it has no rollout, no prompt or another number of grids than images. Whether the image
    tokens of the prompt fit the grids only the policy's processor can say (`PolicyProcessor.check_image_tokens`).
    """

    ticket_id: str
    sample_id: str
    prompt_token_ids_P: IntArray  # (P,), image placeholders expanded, as the engine reports them
    images: tuple[bytes, ...]  # encoded: (rgb,) or (rgb, depth)
    image_grid_thw: tuple[tuple[int, int, int], ...]  # patches per image: time, height, width
    rollouts: tuple[Rollout, ...]  # G

    def __post_init__(self) -> None:
        if not self.rollouts or len(self.prompt_token_ids_P) == 0:
            raise RecordError(
                f"{len(self.rollouts)} rollouts of a prompt of {len(self.prompt_token_ids_P)} tokens; both must be 1 "
                "or more"
            )
        if len(self.images) != len(self.image_grid_thw):
            raise RecordError(f"{len(self.images)} images but {len(self.image_grid_thw)} rows in image_grid_thw")
        if any(math.prod(grid) < 1 for grid in self.image_grid_thw):
            raise RecordError(f"image_grid_thw = {self.image_grid_thw}: every image has at least one patch")

    @property
    def oldest_version(self) -> int:
        """Lowest policy version that wrote any token of the group."""
        return min(version for rollout in self.rollouts for version, _ in rollout.version_spans)

    @property
    def newest_version(self) -> int:
        """Highest policy version that wrote any token of the group."""
        return max(version for rollout in self.rollouts for version, _ in rollout.version_spans)

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rollouts."""
        return sum(len(rollout.token_ids_T) for rollout in self.rollouts)


@dataclass(frozen=True)
class ScoredGroup:
    """A rollout group with its rewards: what the learner trains on."""

    group: RolloutGroup
    rewards_G: FloatArray  # (G,), weighted sum of the reward terms
    terms_G: dict[str, FloatArray]  # unweighted terms ("format", "answer", "box", "depth") and diagnostics, each (G,)
