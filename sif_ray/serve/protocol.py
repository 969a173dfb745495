"""What travels over HTTP: the request and the reply of `POST /v1/sif`."""

from __future__ import annotations

import base64

from pydantic import BaseModel, ConfigDict, Field


class SifRequest(BaseModel):
    """The JSON form of a request; the multipart form has a file `image` and a field `question`."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(description="PNG, JPEG or WebP as base64 or as a data URL; addresses are not fetched")
    question: str

    @classmethod
    def of(cls, image: bytes, question: str) -> SifRequest:
        """The request for an encoded image."""
        return cls(image=base64.b64encode(image).decode("ascii"), question=question)


class FocusBox(BaseModel):
    bbox_xyxy_norm: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2 as fractions of the image")
    depth: float | None = Field(description="relative depth that the policy states for the box, 0 = near, 1 = far")


class FocusStep(BaseModel):
    """One look of the policy: where, and what it says about it."""

    boxes: list[FocusBox]
    text: str


class Seconds(BaseModel):
    depth: float
    generate: float


class SifResponse(BaseModel):
    answer: str | None = Field(description="content of the answer block; null where the output has none")
    valid: bool = Field(description="whether the output is a well-formed trace")
    reasons: list[str] = Field(description="why it is not; empty when valid")
    steps: list[FocusStep] = Field(description="of an invalid output the boxes that can be read, without texts")
    depth_image: str = Field(description="PNG as base64: Spectral_r colours of relative depth, red = near, blue = far")
    text: str = Field(description="the output as it was generated")
    policy_version: int
    seconds: Seconds


class Refusal(BaseModel):
    """The body of every 4xx reply."""

    detail: str
