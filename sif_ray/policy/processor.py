"""Token-exact multimodal prompts: what the engine is sent and what the learner trains on, checked when it is made."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import AutoProcessor

from sif_ray.config import PromptConfig
from sif_ray.method.prompts import user_content
from sif_ray.policy.model import resolve_model

Message = Mapping[str, Any]
"""{"role": ..., "content": a text, or parts {"type": "text", "text": ...} and {"type": "image"}}."""


class PolicyInputError(ValueError):
    """The prompt and its images do not fit together, or an image cannot be read."""


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt in both token forms. P prompt tokens, N patches of all images.

    `engine_token_ids` has one placeholder per image, as vLLM wants it; `token_ids_P` has one per image token, as the
    model sees it. An engine that is sent the second form would expand it again, silently.
    """

    engine_token_ids: list[int]
    token_ids_P: list[int]
    pixel_values: npt.NDArray[np.float32]  # (N, channels * time * patch * patch)
    image_grid_thw: tuple[tuple[int, int, int], ...]  # patches per image: time, height, width


class PolicyProcessor:
    """Tokenizer, image processor and chat template of one checkpoint."""

    def __init__(self, model: str, max_pixels: int | None = None) -> None:
        """`max_pixels` limits one image; None or 0 keeps the checkpoint's own limit."""
        self._processor = AutoProcessor.from_pretrained(resolve_model(model))
        self._tokenizer = self._processor.tokenizer
        self._max_pixels = max_pixels or None
        self.image_token_id: int = self._processor.image_token_id
        self.eos_token_id: int = self._tokenizer.eos_token_id
        self.pad_token_id: int = self._tokenizer.pad_token_id

    def prompt_text(self, question: str, prompt: PromptConfig) -> str:
        """The chat-templated prompt with one image placeholder per image, ready for the assistant's turn."""
        content = user_content(question, depth_image=prompt.depth_image, with_depth_words=prompt.with_depth_words)
        return self.chat_text([{"role": "user", "content": content}])

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Messages through the checkpoint's chat template, ready for the assistant's turn."""
        return str(self._processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))

    def encode_prompt(self, question: str, images: Sequence[bytes], prompt: PromptConfig) -> EncodedPrompt:
        """The prompt for a question about encoded images: (rgb, depth), or (rgb,) without the depth image.

        Raises `PolicyInputError` when images are missing, unreadable, or give another number of image tokens than the
        prompt holds.
        """
        return self.encode_prompts([question], images, prompt)[0]

    def encode_prompts(
        self, questions: Sequence[str], images: Sequence[bytes], prompt: PromptConfig
    ) -> list[EncodedPrompt]:
        """`encode_prompt` of several questions about the same images, which are decoded once."""
        features = self.image_features(images)
        return [self._encode(self.prompt_text(question, prompt), features) for question in questions]

    def encode_chat(self, text: str, images: Sequence[bytes]) -> EncodedPrompt:
        """A chat-templated text with one placeholder per image, and the images."""
        return self._encode(text, self.image_features(images))

    def _encode(self, text: str, features: dict[str, npt.NDArray[np.float32]]) -> EncodedPrompt:
        engine_token_ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = engine_token_ids.count(self.image_token_id)
        grid: tuple[tuple[int, int, int], ...] = tuple(tuple(map(int, row)) for row in features["image_grid_thw"])  # type: ignore[misc]
        if expected != len(grid):
            raise PolicyInputError(f"the prompt has {expected} image placeholders but {len(grid)} images were given")
        lengths = iter(self._image_lengths(grid))
        token_ids_P: list[int] = []
        for token in engine_token_ids:
            token_ids_P.extend([token] * next(lengths) if token == self.image_token_id else [token])
        return EncodedPrompt(engine_token_ids, token_ids_P, features["pixel_values"], grid)

    def check_image_tokens(
        self, prompt_token_ids: Sequence[int], image_grid_thw: Sequence[tuple[int, int, int]]
    ) -> None:
        """Raise `PolicyInputError` unless the prompt has one unbroken run of image tokens per image, each as long as
        the image's grid gives features: a model would otherwise read some features in another image's place."""
        runs = itertools.groupby(prompt_token_ids, key=lambda token: token == self.image_token_id)
        found = [sum(1 for _ in run) for is_image, run in runs if is_image]
        expected = self._image_lengths(image_grid_thw)
        if found != expected:
            raise PolicyInputError(
                f"the prompt has runs of {found} image tokens, but the grids {tuple(image_grid_thw)} give {expected} "
                "image features"
            )

    def _image_lengths(self, image_grid_thw: Sequence[tuple[int, int, int]]) -> list[int]:
        """Image tokens per image."""
        merge = self._processor.image_processor.merge_size**2
        return [time * height * width // merge for time, height, width in image_grid_thw]

    def image_features(self, images: Sequence[bytes]) -> dict[str, npt.NDArray[np.float32]]:
        """`pixel_values` and `image_grid_thw` of encoded images, as the checkpoint's image processor makes them."""
        pictures = [decode_image(image) for image in images]
        features = self._processor.image_processor(pictures, return_tensors="np", **self.image_size_limits())
        return {key: features[key] for key in ("pixel_values", "image_grid_thw")}

    def image_size_limits(self) -> dict[str, dict[str, int]]:
        """Arguments that make any processor of this checkpoint, an engine's too, see images in the same size."""
        if not self._max_pixels:
            return {}
        smallest = self._processor.image_processor.size["shortest_edge"]
        return {"size": {"shortest_edge": min(smallest, self._max_pixels), "longest_edge": self._max_pixels}}

    def encode_completion(self, text: str) -> list[int]:
        """Completion tokens of an assistant text, with the end-of-sequence token."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.eos_token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of completion tokens, without special tokens."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def decode_image(encoded: bytes) -> Image.Image:
    """RGB image of encoded bytes. Raises `PolicyInputError` when they are no image."""
    try:
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PolicyInputError(f"image of {len(encoded)} bytes cannot be decoded: {error}") from error
