"""LoRA adapters beside each other in one engine, against peft's own merge of each."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from rollout_reference import MODEL, Reference, make_request

from sif_ray.config import ConfigError, EngineConfig, PromptConfig
from sif_ray.policy.adapter import check_served_adapter
from sif_ray.policy.model import in_vision_tower
from sif_ray.rollout.engine import RolloutEngine
from sif_ray.rollout.errors import WeightSyncError

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, seed: int, rank: int = 4, also: str = "") -> Reference:
    """A random adapter as peft saves it, and the model that peft merges it into."""
    reference = Reference(0.0)
    names = [
        name
        for name, module in reference._model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (bool(also and also in name) or (name.endswith(LAYERS) and not in_vision_tower(name)))
    ]
    adapted = peft.get_peft_model(reference._model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    reference._model = adapted.merge_and_unload()
    return reference


@pytest.mark.timeout(600)
async def test_each_request_is_answered_with_its_adapter(tmp_path):
    references = {"": Reference(0.0), "first": write_adapter(tmp_path / "first", 1)}
    references["second"] = write_adapter(tmp_path / "second", 2, rank=9)
    adapters = {name: str(tmp_path / name) for name in ("first", "second")}
    for name, folder in adapters.items():
        check_served_adapter(folder, MODEL, f"adapters.{name}")
    config = EngineConfig(max_model_len=256, max_num_seqs=8, kv_cache_gib=0.25)
    engine = RolloutEngine(MODEL, config, PromptConfig(), adapters=adapters)
    await engine.start()
    try:
        asked = replace(make_request("adapters", 2, max_tokens=12), seed=5)
        names = [*references, *references]
        groups = await asyncio.gather(*(engine.generate(replace(asked, adapter=name)) for name in names))
        with pytest.raises(WeightSyncError, match="has adapters"):
            await engine.update_weights(references["first"].update(1))
    finally:
        await engine.shutdown()
    for name, group in zip(names, groups, strict=True):
        for rollout in group.rollouts:
            for other, reference in references.items():
                logprobs_Tv = torch.log_softmax(reference.logits(group, rollout), -1)
                expected_T = logprobs_Tv.gather(-1, torch.tensor(rollout.token_ids_T).long()[:, None])[:, 0].numpy()
                fits = np.allclose(rollout.logprobs_T, expected_T, atol=1e-3)
                assert fits == (other == name), f"asked {name!r}, compared with {other!r}"


@pytest.mark.parametrize("also", ["visual", "lm_head"])
def test_an_adapter_that_would_end_an_engine_is_refused(tmp_path, also):
    write_adapter(tmp_path / "more", 1, also=also)
    with pytest.raises(ConfigError, match=rf"adapters.cars = .*changes (model.)?{also}.*merge it \(sif-ray export"):
        check_served_adapter(str(tmp_path / "more"), MODEL, "adapters.cars")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"adapters.cars = .*has no adapter_config.json"):
        check_served_adapter(str(tmp_path), MODEL, "adapters.cars")
