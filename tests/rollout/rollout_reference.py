"""The independent truth of the engine tests: plain Hugging Face forward passes, and requests to ask engines with.

The reference sees a whole prompt and completion at once with the plain model, an engine makes it token by token: equal
log-probs say that prompt, images, sampling, caches and weights are what the rollout claims.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from sif_ray.config import SamplingConfig
from sif_ray.policy.model import save_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.records import FloatArray, Rollout, RolloutGroup
from sif_ray.rollout.engine import RolloutRequest
from sif_ray.rollout.weights import ByteArray, WeightUpdate, make_update
from sif_ray.toyworld.assets import path

MODEL = str(path("tiny_policy"))


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize((112, 112)).save(encoded, format="PNG")
    return encoded.getvalue()


def make_request(name: str, num_rollouts: int = 1, **sampling: Any) -> RolloutRequest:
    pictures = (picture(len(name)), picture(1000 + len(name)))
    return RolloutRequest(name, name, "Which is closer?", pictures, num_rollouts, SamplingConfig(**sampling))


class Reference:
    """Log-probs by one plain forward pass of Hugging Face's model."""

    def __init__(self, noise: float, only: str = "", model: str = MODEL) -> None:
        """Weights of the checkpoint plus `noise` times the spread of each tensor with `only` in its name; 0 = the
        checkpoint itself."""
        torch.manual_seed(0)
        self._model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if only in name:
                    parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
        self._processor = PolicyProcessor(MODEL)

    def update(self, version: int, put: Callable[[ByteArray], Any] | None = None) -> WeightUpdate:
        """All weights as the learner publishes them, in several buckets."""
        named = list(self._model.named_parameters())
        return make_update(version, [named[start : start + 30] for start in range(0, len(named), 30)], put=put)

    def save(self, folder: str) -> None:
        """Write a checkpoint folder."""
        save_policy(self._model, MODEL, folder)

    @torch.no_grad()
    def logits(self, group: RolloutGroup, rollout: Rollout) -> torch.Tensor:
        """(T, vocabulary) logits from which the T tokens of a rollout were drawn."""
        prompt = torch.tensor(group.prompt_token_ids_P).long()
        input_ids = torch.cat([prompt, torch.tensor(rollout.token_ids_T).long()])[None]
        features = self._processor.image_features(group.images)
        output = self._model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=(input_ids == self._processor.image_token_id).int(),
            pixel_values=torch.from_numpy(features["pixel_values"]),
            image_grid_thw=torch.from_numpy(np.asarray(features["image_grid_thw"])),
        )
        logits = output.logits[0, len(prompt) - 1 : -1]
        logits[:, self._processor.image_token_id] = -torch.inf  # never sampled
        return logits

    def logprobs(self, group: RolloutGroup, rollout: Rollout, temperature: float = 1.0) -> FloatArray:
        """(T,) log-probs of a rollout's tokens."""
        logprobs = torch.log_softmax(self.logits(group, rollout) / temperature, dim=-1)
        return logprobs[torch.arange(len(logprobs)), torch.tensor(rollout.token_ids_T).long()].numpy()
