"""GRPO in plain PyTorch: one process, one unpacked sequence at a time, every formula written out again.

It shares no code with `sif_ray.learner` and `sif_ray.policy`: the policy is transformers' own model, the optimiser
torch's AdamW, the loss a loop over sequences. What it gives is the truth that the learner is held against.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from sif_ray.config import GrpoConfig, ObjectiveConfig
from sif_ray.records import Rollout, ScoredGroup

Weights = Mapping[str, Tensor]
LogProbs = list[Tensor]
"""Of every rollout of a batch, in order, each (T,)."""


@dataclass(frozen=True)
class PlainUpdate:
    loss: float
    grad_norm: float  # before clipping
    gradients: dict[str, Tensor]  # before clipping


class PlainLearner:
    """Policy, frozen reference and AdamW of a run: full fine-tuning in float32 at a linear or constant rate.

    `config.policy` is a folder, `num_updates` are those of the whole run.
    """

    def __init__(self, config: GrpoConfig, num_updates: int) -> None:
        self._config, self._num_updates, self._done = config, num_updates, 0
        self.policy, self._reference = load_plain(config.policy), load_plain(config.policy)
        self._image_processor = AutoImageProcessor.from_pretrained(config.policy)
        matrices = [weights for weights in self.policy.parameters() if weights.ndim > 1]
        others = [weights for weights in self.policy.parameters() if weights.ndim <= 1]
        decay = config.learner.weight_decay
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
        )

    def train(self, groups: Sequence[ScoredGroup]) -> list[PlainUpdate]:
        """All updates on one batch: the same whole batch every time."""
        proximal = self.log_probs(groups)
        return [self._step(self.gradients(groups, proximal)) for _ in range(self._config.objective.updates_per_batch)]

    def train_supervised(self, groups: Sequence[ScoredGroup], first: int) -> PlainUpdate:
        """One supervised update on the mean over the completions' tokens from number `first` on."""
        predicted = [logprobs_T[first:] for logprobs_T in self._log_probs(self.policy, groups)]
        return self._step(self._backward(-torch.cat(predicted).mean()))

    def log_probs(self, groups: Sequence[ScoredGroup]) -> LogProbs:
        """Of the batch under the current weights, without a graph."""
        with torch.no_grad():
            return self._log_probs(self.policy, groups)

    def gradients(self, groups: Sequence[ScoredGroup], proximal: LogProbs) -> PlainUpdate:
        """Loss and gradients at the current weights, which stay."""
        current = self._log_probs(self.policy, groups)
        with torch.no_grad():
            reference = self._log_probs(self._reference, groups)
        return self._backward(
            batch_loss(self._config.objective, groups, current, proximal, reference, self._config.sampling.max_tokens)
        )

    def load(self, weights: Weights) -> None:
        """Put other weights in the policy's place; the frozen reference stays."""
        with torch.no_grad():
            for name, own in self.policy.named_parameters():
                own.copy_(weights[name])

    def _backward(self, loss: Tensor) -> PlainUpdate:
        self.policy.zero_grad()
        loss.backward()
        gradients = {name: weights.grad.clone() for name, weights in self.policy.named_parameters()}
        norm = torch.sqrt(sum(gradient.pow(2).sum() for gradient in gradients.values()))
        return PlainUpdate(loss.item(), norm.item(), gradients)

    def _step(self, update: PlainUpdate) -> PlainUpdate:
        learner = self._config.learner
        scale = min(1.0, learner.max_grad_norm / update.grad_norm)
        for weights in self.policy.parameters():
            weights.grad.mul_(scale)
        left = {"linear": 1 - self._done / self._num_updates, "constant": 1.0}[learner.lr_schedule]
        for group in self._optimizer.param_groups:
            group["lr"] = learner.learning_rate * left
        self._optimizer.step()
        self._done += 1
        return update

    def _log_probs(self, policy: torch.nn.Module, groups: Sequence[ScoredGroup]) -> LogProbs:
        return [
            self._rollout_log_probs(policy, scored, rollout) for scored in groups for rollout in scored.group.rollouts
        ]

    def _rollout_log_probs(self, policy: torch.nn.Module, scored: ScoredGroup, rollout: Rollout) -> Tensor:
        """Of one completion, from a forward pass over its prompt and itself alone."""
        pictures = [Image.open(io.BytesIO(image)).convert("RGB") for image in scored.group.images]
        prompt = torch.as_tensor(np.asarray(scored.group.prompt_token_ids_P, dtype=np.int64))
        completion = torch.as_tensor(np.asarray(rollout.token_ids_T, dtype=np.int64))
        ids = torch.cat([prompt, completion])[None]
        is_image = ids == policy.config.image_token_id
        logits = policy(
            input_ids=ids, mm_token_type_ids=is_image.int(), **self._image_processor(pictures, return_tensors="pt")
        ).logits[0, len(prompt) - 1 : -1]
        logits = logits / self._config.sampling.temperature
        logits[:, policy.config.image_token_id] = -torch.inf  # the engine never samples a placeholder
        return logits[torch.arange(len(completion)), completion] - logits.logsumexp(-1)


def batch_loss(
    objective: ObjectiveConfig,
    groups: Sequence[ScoredGroup],
    current: LogProbs,
    proximal: LogProbs,
    reference: LogProbs,
    max_tokens: int,
) -> Tensor:
    """The loss of a batch by the papers that `ObjectiveConfig` names, sequence by sequence."""
    advantages = [advantage for scored in groups for advantage in group_advantages(objective, scored.rewards_G)]
    behaviour = [torch.from_numpy(rollout.logprobs_T) for scored in groups for rollout in scored.group.rollouts]
    losses = [
        token_losses(objective, *sequence)
        for sequence in zip(current, proximal, behaviour, reference, advantages, strict=True)
    ]
    if objective.loss_mean == "sequence":
        return torch.stack([loss_T.mean() for loss_T in losses]).mean()
    if objective.loss_mean == "token":
        return torch.cat(losses).mean()
    return torch.stack([loss_T.sum() / max_tokens for loss_T in losses]).mean()


def group_advantages(objective: ObjectiveConfig, rewards_G: np.ndarray) -> list[float]:
    rewards = rewards_G.astype(np.float64)
    mean = sum(rewards) / len(rewards)
    deviation = np.sqrt(sum((rewards - mean) ** 2) / (len(rewards) - 1))
    scale = deviation + 1e-4 if objective.advantage_norm == "std" else 1.0
    return [float((reward - mean) / scale) for reward in rewards]


def token_losses(
    objective: ObjectiveConfig,
    current_T: Tensor,
    proximal_T: Tensor,
    behaviour_T: Tensor,
    reference_T: Tensor,
    advantage: float,
) -> Tensor:
    """(T,) of one sequence."""
    old_T = behaviour_T if objective.ratio_to == "behaviour" else proximal_T
    ratio_T = (current_T - old_T).exp()
    weight_T = (old_T - behaviour_T).exp()
    if objective.surrogate == "gspo":
        ratio_T = (current_T - old_T).mean().exp().expand_as(current_T)
        weight_T = (old_T - behaviour_T).mean().exp().expand_as(current_T)
    weight_T = torch.minimum(weight_T, torch.tensor(objective.importance_cap)) if objective.importance_cap else 1.0
    bounded_T = torch.clip(ratio_T, 1 - objective.clip_low, 1 + objective.clip_high)
    if objective.surrogate == "cispo":
        gain_T = bounded_T.detach() * advantage * current_T
    else:
        gain_T = torch.minimum(ratio_T * advantage, bounded_T * advantage)
    log_ratio_T = reference_T - current_T
    return -weight_T * gain_T + objective.kl_beta * (log_ratio_T.exp() - log_ratio_T - 1)


def load_plain(folder: str) -> torch.nn.Module:
    """The policy as transformers gives it."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
