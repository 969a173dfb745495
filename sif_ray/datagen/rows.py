"""One annotated photograph with its depth to dataset rows: frames, trace, checks."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from sif_ray.config import GenerateConfig
from sif_ray.datagen.checks import faults
from sif_ray.datagen.photos import Annotation, Photo
from sif_ray.datagen.teacher import write_trace
from sif_ray.datagen.traces import areas_of, sample_rng
from sif_ray.method.boxes import Box, BoxError
from sif_ray.method.depth_code import decode
from sif_ray.method.expansion import forward_frames
from sif_ray.method.trace import TraceError
from sif_ray.records import Sample


@dataclass(frozen=True)
class Row:
    """A sample and why it is refused; no reasons = accepted."""

    sample: Sample
    reasons: tuple[str, ...]


def photo_rows(photo: Photo, config: GenerateConfig) -> list[Row]:
    """One row per question of a photograph that has its depth image."""
    if photo.error:
        return [Row(_bare_sample(photo, item, config), (photo.error,)) for item in photo.annotations]
    with Image.open(io.BytesIO(photo.depth_image)) as depth_image:
        depth_rel = decode(np.asarray(depth_image.convert("RGB")), config.profile)
    return [_row(_bare_sample(photo, item, config), item.names, depth_rel, config) for item in photo.annotations]


def _bare_sample(photo: Photo, item: Annotation, config: GenerateConfig) -> Sample:
    return Sample(
        sample_id=item.sample_id,
        scene_id=photo.scene_id,
        dataset=photo.dataset,
        split=photo.split,
        question=item.question,
        question_type=item.question_type,
        answer=item.answer,
        boxes=item.boxes,
        width=photo.width,
        height=photo.height,
        image=photo.image,
        depth_image=photo.depth_image,
        depth_source=photo.depth_source,
        source_frame=photo.source_frame,
        profile=config.profile,
    )


def _row(sample: Sample, names: tuple[str, ...], depth_rel: npt.NDArray[np.float64], config: GenerateConfig) -> Row:
    if not sample.question.strip():
        return Row(sample, ("question_empty",))
    rng = sample_rng(config.seed, sample.sample_id)
    try:
        frames = forward_frames(sample.boxes, sample.width, sample.height, rng, config.profile)
        sample = replace(sample, frames=tuple(_rounded(frame, config.decimals) for frame in frames))
        sample = replace(
            sample, trace=write_trace(areas_of(sample.frames, depth_rel), names, sample.answer, config.decimals)
        )
    except BoxError:
        return Row(sample, ("boxes_invalid",))
    except TraceError as error:
        return Row(sample, tuple(f"trace_{reason}" for reason in error.reasons))
    return Row(sample, tuple(faults(sample, depth_rel, config.decimals)))


def _rounded(frame: list[Box], decimals: int) -> tuple[Box, ...]:
    return tuple(
        (round(x1, decimals), round(y1, decimals), round(x2, decimals), round(y2, decimals)) for x1, y1, x2, y2 in frame
    )
