"""The recipe of the tiny depth model: `python -m sif_ray.toyworld.tiny_depth --output FOLDER`.

A `DepthAnythingForDepthEstimation` of half a million parameters, trained on freshly rendered scenes to predict inverse
depth. A toy: it reads the haze, the shadows and the plain of rendered scenes, and is no depth model for photographs.
About a quarter of an hour on one core.
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
import torch
from torch.nn import functional
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from sif_ray.method.depth_code import box_mean, from_disparity
from sif_ray.toyworld.render import render
from sif_ray.toyworld.scenes import SIZE_PX, make_scene

log = logging.getLogger(__name__)

SEED_BASE = 3_000_000_000  # training scenes; the other stages draw theirs elsewhere
TARGET_SCALE_M = 3.0  # the model predicts 3 m / z: between 0.2 for the sky and 0.95 for the nearest solid
MEAN, STD = 0.5, 0.25


def build() -> DepthAnythingForDepthEstimation:
    """The model with random weights. Its last bias starts at a typical target: the head ends in a ReLU, which would
    die at zero."""
    backbone = Dinov2Config(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=SIZE_PX,
        patch_size=7,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=7,
            reassemble_hidden_size=96,
            reassemble_factors=[2, 1, 1, 0.5],
            neck_hidden_sizes=[24, 32, 48, 48],
            fusion_hidden_size=32,
            head_hidden_size=16,
        )
    )
    torch.nn.init.constant_(model.head.conv3.bias, 0.5)
    return model


def batch(seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels (B, 3, H, W) and targets (B, H, W) of rendered scenes."""
    renderings = [render(make_scene(seed)) for seed in seeds]
    pixels = np.stack([rendering.rgb for rendering in renderings]).transpose(0, 3, 1, 2)
    disparity = np.stack([rendering.disparity for rendering in renderings])
    return (torch.from_numpy(pixels) / 255 - MEAN) / STD, torch.from_numpy(disparity) * TARGET_SCALE_M


def train(folder: Path, minutes: float, batch_size: int, seed: int) -> None:
    """Train for `minutes` and write the checkpoint with its image processor to `folder`."""
    torch.manual_seed(seed)
    model = build().train()
    log.info("%d parameters", sum(parameter.numel() for parameter in model.parameters()))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    started, step, average = time.monotonic(), 0, math.nan
    while (done := (time.monotonic() - started) / 60 / minutes) < 1:
        pixels, targets = batch([SEED_BASE + step * batch_size + i for i in range(batch_size)])
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * min(1.0, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
        predicted = model(pixels).predicted_depth
        loss = functional.l1_loss(predicted, targets) + 0.5 * _edge_loss(predicted, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average = float(loss.detach()) if step == 0 else 0.95 * average + 0.05 * float(loss.detach())
        step += 1
        if step % 50 == 0:
            log.info("step %d, %.1f min, loss %.4f", step, done * minutes, average)
        if step % 400 == 0:
            save(model, folder)
    save(model, folder)
    log.info("held-out: %s", measure(model.eval(), range(200)))


def _edge_loss(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    error = predicted - targets
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def save(model: DepthAnythingForDepthEstimation, folder: Path) -> None:
    """The checkpoint in the Hugging Face layout."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE_PX, "width": SIZE_PX},
        "keep_aspect_ratio": False,
        "ensure_multiple_of": 7,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_pad": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(model: DepthAnythingForDepthEstimation, seeds: Sequence[int]) -> dict[str, float]:
    """Over unseen scenes: mean |error| of depth_rel, and how often the nearer of two solids (true ratio of 1.2 or
    more) is told right by the mean depth of their boxes."""
    errors, right = [], []
    for seed in seeds:
        scene = make_scene(seed)
        rendering = render(scene)
        pixels, _ = batch([seed])
        depth_rel = from_disparity(model(pixels).predicted_depth[0].numpy())
        errors.append(float(np.abs(depth_rel - from_disparity(rendering.disparity)).mean()))
        means = [box_mean(depth_rel, rendering.box(index)) for index in range(len(scene.solids))]
        for i, a in enumerate(scene.solids):
            for j, b in enumerate(scene.solids):
                if b.z_m / a.z_m >= 1.2:
                    right.append(means[i] < means[j])
    return {"depth_rel_error": float(np.mean(errors)), "nearer_right": float(np.mean(right))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.output, arguments.minutes, arguments.batch_size, arguments.seed)


if __name__ == "__main__":
    main()
