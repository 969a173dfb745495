"""The recipe of the tiny base policy: `python -m sif_ray.toyworld.pretrain --output FOLDER`.

It renders fresh scenes, asks several plain-text questions about each (`plain_text`) and trains on the answers. The haze
of these scenes says nothing about depth, so that depth must be read from the depth image. A scene's questions are
branches of one sequence, so its images are computed once. Hidden matrices are trained by Muon, the rest by AdamW; a
number is taught with a narrow Gaussian over its neighbours, since 0.31 is nearly 0.32. An hour or two on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from sif_ray.depth.estimator import DepthEstimator
from sif_ray.method.depth_code import encode, from_disparity
from sif_ray.method.prompts import user_content
from sif_ray.policy.branches import BranchedBatch, BranchedSequence, branch_logits, collate
from sif_ray.policy.model import load_policy, save_policy
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.toyworld.plain_text import Text, draw_texts
from sif_ray.toyworld.render import Rendering, render
from sif_ray.toyworld.scenes import FAR_M, NEAR_M, Scene, make_scene
from sif_ray.toyworld.tiny_policy import build, hidden_matrices, number_token_ids

log = logging.getLogger(__name__)

SEED_BASE = 2_000_000_000  # pretraining scenes; the other stages draw theirs elsewhere
NUMBER_SIGMA = 1.0  # hundredths


class Teacher:
    """Turns rendered scenes into branched sequences of plain-text questions."""

    def __init__(self, folder: str) -> None:
        self.processor = PolicyProcessor(folder)
        self.image_processor = self.processor._processor.image_processor
        tokenizer = self.processor._tokenizer
        content = user_content("")
        content[-1] = {"type": "text", "text": "\n"}
        prefix = self.processor.chat_text([{"role": "user", "content": content}]).split("<|im_end|>")[0]
        self._prefix = tokenizer(prefix, add_special_tokens=False)["input_ids"]
        self._turn = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self._tokenizer = tokenizer
        self._estimator = DepthEstimator("toy")

    def sequences(self, seeds: Sequence[int], questions: int) -> list[BranchedSequence]:
        scenes = [make_scene(seed) for seed in seeds]
        renderings = [render(scene, _random_haze(scene)) for scene in scenes]
        depths_rel = self._depths(scenes, renderings)
        images = [image for r, depth in zip(renderings, depths_rel, strict=True) for image in (r.rgb, encode(depth))]
        features = self.image_processor(images, return_tensors="np")
        patches = features["pixel_values"].reshape(len(seeds), -1, features["pixel_values"].shape[-1])
        grids = features["image_grid_thw"].reshape(len(seeds), 2, 3)
        found = []
        for number, (scene, rendering, depth) in enumerate(zip(scenes, renderings, depths_rel, strict=True)):
            texts = draw_texts(scene, rendering, depth, questions, np.random.default_rng([scene.seed, 7]))
            found.append(self._sequence(texts, patches[number], [tuple(map(int, grid)) for grid in grids[number]]))
        return found

    def _depths(self, scenes: Sequence[Scene], renderings: Sequence[Rendering]) -> list[npt.NDArray[np.floating]]:
        """What the policy is shown: for every third scene the tiny depth model's map, exact depth for the others."""
        photos = [Image.fromarray(render(scene).rgb) for scene in scenes[::3]]
        estimated = iter(self._estimator.estimate(photos))
        return [
            next(estimated) if number % 3 == 0 else from_disparity(_blurred(rendering))
            for number, rendering in enumerate(renderings)
        ]

    def _sequence(self, texts: list[Text], patches: np.ndarray, grids: list[tuple[int, ...]]) -> BranchedSequence:
        image_tokens = iter(time * height * width // 4 for time, height, width in grids)
        prefix: list[int] = []
        for token in self._prefix:
            prefix.extend([token] * next(image_tokens) if token == self.processor.image_token_id else [token])
        branches, masks = [], []
        for question, answer in texts:
            asked = self._tokenizer(question, add_special_tokens=False)["input_ids"] + self._turn
            answered = self.processor.encode_completion(answer)
            branches.append(asked + answered)
            masks.append([False] * len(asked) + [True] * len(answered))
        return BranchedSequence(prefix, branches, patches, grids, masks)  # type: ignore[arg-type]


def _random_haze(scene: Scene) -> list[float]:
    """Depths to take the solids' haze from: true haze would tell which is closer without a look at the depth."""
    rng = np.random.default_rng([scene.seed, 0xA12])
    return rng.uniform(NEAR_M, FAR_M, len(scene.solids)).tolist()


def _blurred(rendering: Rendering) -> npt.NDArray[np.float32]:
    """Half of the depth maps lose their sharp edges, as the maps of a depth model do."""
    sigma_px = max(0.0, float(np.random.default_rng(rendering.rgb[:8].sum()).uniform(-2, 2)))
    return gaussian_filter(rendering.disparity, sigma_px) if sigma_px else rendering.disparity


class SoftNumberLoss:
    """Cross-entropy in which a number's target is a Gaussian over the 101 numbers."""

    def __init__(self, number_ids: list[int], vocabulary: int) -> None:
        self._ids = torch.tensor(number_ids)
        self._place = torch.full((vocabulary,), -1)
        self._place[self._ids] = torch.arange(len(number_ids))
        offsets = torch.arange(len(number_ids))[:, None] - torch.arange(len(number_ids))[None]
        self._targets = torch.softmax(-(offsets**2) / (2 * NUMBER_SIGMA**2), dim=-1)

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        logprobs = torch.log_softmax(logits.float(), -1)
        place = self._place[targets]
        is_number = place >= 0
        words = -logprobs[~is_number].gather(-1, targets[~is_number, None])
        numbers = -(self._targets[place[is_number]] * logprobs[is_number][:, self._ids]).sum(-1)
        loss = (words.sum() + numbers.sum()) / len(targets)
        return loss, {"loss_words": float(words.detach().mean()), "loss_numbers": float(numbers.detach().mean())}


def train(folder: str, minutes: float, scenes_per_step: int, questions: int, seed: int, start: str | None) -> None:
    """Train for `minutes` (the rate falls to zero over them) and write the checkpoint to `folder`."""
    output = Path(folder)
    if start is None:
        start = str(output.with_name(output.name + "-random"))
        build(start, seed)
    teacher = Teacher(start)
    policy = load_policy(start)
    policy.train()
    loss_of = SoftNumberLoss(number_token_ids(teacher._tokenizer), policy.config.text_config.vocab_size)
    optimisers = _optimisers(policy)
    log.info("%d parameters", sum(p.numel() for p in policy.parameters()))
    started, step, saved, averages = time.monotonic(), 0, time.monotonic(), {}
    lines = (output.parent / f"{output.name}.jsonl").open("a", encoding="utf-8")
    while (elapsed := (time.monotonic() - started) / 60) < minutes:
        seeds = [SEED_BASE + seed * 100_000_000 + step * scenes_per_step + i for i in range(scenes_per_step)]
        batch = collate(teacher.sequences(seeds, questions), policy, teacher.processor.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = _step(policy, batch, loss_of, optimisers, _rate(step, elapsed / minutes))
        averages = {key: 0.95 * averages.get(key, value) + 0.05 * value for key, value in values.items()}
        step += 1
        if step % 50 == 0:
            row = {"step": step, "minutes": round(elapsed, 2), "scenes": step * scenes_per_step}
            row |= {key: round(value, 4) for key, value in averages.items()}
            log.info("%s", row)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
        if time.monotonic() - saved > 300:
            save_policy(policy, start, folder)
            saved = time.monotonic()
    save_policy(policy, start, folder)


def _optimisers(policy: nn.Module) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = hidden_matrices(policy)
    chosen = {id(p) for p in matrices}
    others = [p for p in policy.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=1.5e-2, weight_decay=0.0, ns_steps=5)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, 1.5e-2), (adam, 3e-3)]


def _rate(step: int, share_done: float) -> float:
    return min(1.0, (step + 1) / 60) * (0.5 * (1 + math.cos(math.pi * min(1.0, share_done))) * 0.98 + 0.02)


def _step(
    policy: nn.Module,
    batch: BranchedBatch,
    loss_of: SoftNumberLoss,
    optimisers: list[tuple[torch.optim.Optimizer, float]],
    rate: float,
) -> dict[str, float]:
    loss, values = loss_of(branch_logits(policy, batch), batch.input_ids.flatten()[batch.target_at_M])
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    for optimiser, peak in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = peak * rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return {"loss": float(loss.detach()), **values}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder of the checkpoint; a log stands beside it")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--scenes-per-step", type=int, default=24)
    parser.add_argument("--questions", type=int, default=9, help="per scene")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", help="continue from this checkpoint instead of random weights")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(
        arguments.output,
        arguments.minutes,
        arguments.scenes_per_step,
        arguments.questions,
        arguments.seed,
        arguments.start,
    )


if __name__ == "__main__":
    main()
