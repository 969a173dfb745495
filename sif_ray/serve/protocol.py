"""What travels over HTTP: requests, replies and events of `POST /v1/sif`, and what is read of OpenAI's chat requests.

Chat replies are the openai package's own types.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

_RED_SQUARE = (  # 8 by 8
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlEQVR42mM8ISfHgA0wMeAAg1MCANDKARQfGKMRAAAAAElFTkSuQmCC"
)
_ADDRESSES = "addresses are fetched only from origins that the server's owner allows, by default from none"


class SifRequest(BaseModel):
    """The JSON form of a request; the multipart form has a file `image` and fields `question` and `model`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"image": _RED_SQUARE, "question": "What colour is this?"}]},
    )

    image: str = Field(description=f"PNG, JPEG or WebP as base64 or as a data URL; {_ADDRESSES}")
    question: str
    model: str = Field("", description="a name that GET /v1/models lists, without `-plain`; empty = the policy itself")

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
    depth: float = Field(description="until the depth image was there, reading of the photograph included")
    generate: float


class SifResponse(BaseModel):
    answer: str | None = Field(description="content of the answer block; null where the output has none")
    valid: bool = Field(description="whether the output is a well-formed trace")
    reasons: list[str] = Field(description="why it is not; empty when valid")
    steps: list[FocusStep] = Field(description="of an invalid output the boxes that can be read, without texts")
    depth_image: str = Field(description="PNG as base64: Spectral_r colours of relative depth, red = near, blue = far")
    overlay_image: str | None = Field(None, description="with `?overlay=1`: the steps drawn, JPEG as base64")
    text: str = Field(description="the output as it was generated")
    policy_version: int
    seconds: Seconds


class DepthEvent(BaseModel):
    """First of a stream, named `depth`."""

    depth_image: str = Field(description="as in the whole reply")


class StepEvent(FocusStep):
    """A step that is new or whose text has grown, named `step`. It replaces what was sent for this index before."""

    index: int = Field(description="place in `steps`, from 0")


class AnswerEvent(BaseModel):
    """Named `answer`, sent when it has grown."""

    text: str = Field(description="content of the answer block so far")


class Problem(BaseModel):
    message: str = Field(description="what is wrong, with the field and the way out")
    type: str = "invalid_request_error"


class Refusal(BaseModel):
    """The body of every refusal, in the form that OpenAI clients read."""

    error: Problem


SifEvent = DepthEvent | StepEvent | AnswerEvent | SifResponse
"""What a stream brings; the whole reply is the last, and replaces everything before it."""

EVENT_NAMES: dict[type[BaseModel], str] = {
    DepthEvent: "depth",
    StepEvent: "step",
    AnswerEvent: "answer",
    SifResponse: "reply",
    Refusal: "error",
}
"""Names of server-sent events; `error` is the last one instead of `reply`."""


class _Strict(BaseModel):
    """What is not supported is refused by name: ignored, it would change the answer unseen. So is a value of another
    type, which would be guessed at: true is not 1, and "yes" is not true."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str = Field(description=f"a data URL; {_ADDRESSES}")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Parts = list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


def _form(content: Any) -> str:
    return "parts" if isinstance(content, list) else "text"


class ChatMessage(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")],
        Discriminator(_form),  # so that an error is told of the form that was sent
    ]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


def _no_number(value: Any) -> Any:
    """To Python 0 is false, and so it would be to `Literal`."""
    if value is None or isinstance(value, bool):
        return value
    raise PydanticCustomError("bool_type", "Input should be a valid boolean")


class ChatRequest(_Strict):
    """OpenAI's request, as far as it is supported; `metadata`, `store` and `user` are accepted and not used."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "sif",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_RED_SQUARE}"}},
                                {"type": "text", "text": "What colour is this?"},
                            ],
                        }
                    ],
                }
            ]
        }
    )

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=64)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, description="at most what the server allows, which also bounds it")
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stop: None = None
    logprobs: Annotated[Literal[False] | None, BeforeValidator(_no_number)] = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    metadata: Any = None
    store: Any = None
    user: Any = None
