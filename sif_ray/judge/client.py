"""One attempt at a chat completion, with every way in which it can go wrong as a `CallError`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import email.utils
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIResponseValidationError, APIStatusError, AsyncOpenAI
from openai.types.chat import ChatCompletion
from PIL import Image

RATE_LIMIT = "rate limit"
TOO_MANY_REQUESTS = 429
_PASSING = {408, 409, 425, TOO_MANY_REQUESTS}  # and all from 500 on: another attempt may succeed
_ABOUT_THE_ITEM = {400, 413, 415, 422}


@dataclass(frozen=True)
class Completion:
    """What the model wrote and what it cost."""

    text: str = ""
    finish_reason: str = ""
    tokens_in: int = 0  # prompt tokens; 0 where the server does not say
    tokens_out: int = 0


class CallError(Exception):
    """An attempt brought no reply. `reason` is one of few, so that it can be counted; `detail` is for people."""

    def __init__(
        self, reason: str, detail: str = "", *, retry: bool = False, down: bool = False, retry_after_s: float = 0.0
    ) -> None:
        """`retry`: another attempt may succeed. `down`: speaks against the server, not against this request."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.down = down
        self.retry_after_s = retry_after_s


class CallRefused(CallError):
    """The server works and will not answer this request, now or later: content policy, too long, broken image."""


class EndpointDown(CallError):
    """The endpoint answered nobody for longer than its callers wait, or asks for a longer pause."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail, down=True)


class ChatClient:
    """A chat-completions endpoint. Its attempts are single: who calls it decides about retries."""

    def __init__(self, base_url: str, api_key: str, timeout_s: float) -> None:
        """`api_key` = "" where the server wants none; `timeout_s` is that of a whole attempt."""
        self._client = AsyncOpenAI(base_url=base_url, api_key=api_key or "none", max_retries=0, timeout=timeout_s)
        self._api_key = api_key
        self._timeout_s = timeout_s

    async def complete(self, request: Mapping[str, Any]) -> Completion:
        """Send the keyword arguments `request` of a chat completion. Raises `CallError`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                # Not `chat.completions.create`, which walks through every part of a request for milliseconds.
                found = await self._client.post("/chat/completions", cast_to=ChatCompletion, body=dict(request))
        except TimeoutError as error:
            raise _down("timeout", f"no reply within {self._timeout_s:g} s") from error
        except APIStatusError as error:
            # Without the cause: some servers repeat the key that they refuse.
            raise _of_status(error, self._without_key(error.message)) from None
        except APIConnectionError as error:
            raise _down("connection", repr(error.__cause__ or error)) from error
        except (APIResponseValidationError, ValueError) as error:
            raise _down("broken body", self._without_key(repr(error))) from None  # as above
        if not isinstance(found, ChatCompletion) or not found.choices or not found.choices[0].message:
            raise _down("broken body", self._without_key(repr(found))[:500])
        choice, usage = found.choices[0], found.usage
        if choice.message.refusal or choice.finish_reason == "content_filter":
            raise CallRefused("refusal", self._without_key(choice.message.refusal or "content filter"))
        return Completion(
            text=self._without_key(choice.message.content or ""),
            finish_reason=choice.finish_reason,
            tokens_in=usage.prompt_tokens if usage else 0,
            tokens_out=usage.completion_tokens if usage else 0,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "<key>") if self._api_key else text


def _down(reason: str, detail: str) -> CallError:
    return CallError(reason, detail, retry=True, down=True)


def _of_status(error: APIStatusError, message: str) -> CallError:
    status, detail = error.status_code, message[:500]
    if status in _ABOUT_THE_ITEM:
        return CallRefused(f"HTTP {status}", detail)
    return CallError(
        RATE_LIMIT if status == TOO_MANY_REQUESTS else f"HTTP {status}",
        detail,
        retry=status in _PASSING or status >= 500,
        down=status != TOO_MANY_REQUESTS,
        retry_after_s=retry_after_s(error.response.headers),
    )


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the header `Retry-After`, a number or a date (RFC 9110, 10.2.3); 0 where none can be read."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0


def image_part(image: bytes) -> dict[str, Any]:
    """The encoded image as a part of a user message."""
    with Image.open(io.BytesIO(image)) as opened:  # reads the header only
        kind = Image.MIME[opened.format or ""]
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(image).decode()}"}}
