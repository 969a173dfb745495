"""What is exported is the policy that was trained: log-probs and greedy text of the engine that trained it, as plain
transformers, peft and vLLM read the exported folder."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import yaml
from deepspeed.utils import safe_get_full_optimizer_state
from reference import PlainLearner
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from sif_ray.config import (
    ConfigError,
    EngineConfig,
    GrpoConfig,
    LearnerConfig,
    LoraConfig,
    ObjectiveConfig,
    PromptConfig,
    SamplingConfig,
)
from sif_ray.learner.actor import LearnerGroup
from sif_ray.learner.engine import LearnerEngine
from sif_ray.policy.check import check_policy
from sif_ray.policy.export import add_arguments, run
from sif_ray.policy.processor import PolicyProcessor
from sif_ray.rollout.engine import RolloutEngine, RolloutRequest

LORA = LoraConfig(rank=4, targets="all")


def export(*arguments: str | Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([str(argument) for argument in arguments]))


def config_of(policy: str, **learner) -> GrpoConfig:
    settings = {"learning_rate": 1e-3, "lr_schedule": "constant", "micro_batch_tokens": 200} | learner
    return GrpoConfig(policy=policy, learner=LearnerConfig(**settings))


def engine_of(config: GrpoConfig) -> LearnerEngine:
    return LearnerEngine(config.learner, config.policy, total_steps=4, objective=ObjectiveConfig(kl_beta=0.0))


def trained_run(folder: Path, config: GrpoConfig, groups) -> tuple[LearnerEngine, Path]:
    """An engine after two steps, and its checkpoint in a run folder."""
    engine = engine_of(config)
    for version in range(2):
        engine.train_step(groups, version)
    step = folder / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    engine.save_checkpoint(str(step / "learner"), {"version": 2})
    write_settings(folder, config)
    return engine, step


def write_settings(folder: Path, config: GrpoConfig) -> None:
    learner = {"lora": {"rank": config.learner.lora.rank, "alpha": config.learner.lora.alpha}, "learning_rate": 1e-3}
    settings = {"policy": config.policy, "data": "runs/data", "split": "train", "objective": {}, "learner": learner}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))


def check_log_probs(folder: Path, groups, expected) -> None:
    """Plain transformers on the exported folder against the training engine."""
    plain = PlainLearner(config_of(str(folder)), num_updates=1)
    found = plain.log_probs(groups)
    flat = [logprobs_T for logprobs_G in expected for logprobs_T in logprobs_G]
    for found_T, expected_T in zip(found, flat, strict=True):
        np.testing.assert_allclose(found_T.numpy(), expected_T, atol=1e-4)


@torch.no_grad()
def greedy(policy, folder: str, group) -> list[int]:
    """32 tokens of transformers' own generation after the prompt of a group."""
    features = PolicyProcessor(folder).image_features(group.images)
    prompt = torch.tensor(group.prompt_token_ids_P).long()[None]
    tokens = policy.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        mm_token_type_ids=(prompt == policy.config.image_token_id).int(),
        pixel_values=torch.from_numpy(features["pixel_values"]),
        image_grid_thw=torch.tensor(group.image_grid_thw),
        max_new_tokens=32,
        eos_token_id=PolicyProcessor(folder).eos_token_id,
        do_sample=False,
    )
    return tokens[0, prompt.shape[1] :].tolist()


@pytest.mark.usefixtures("process_group_of_one")
@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_exported_policy_is_the_one_that_was_trained(fresh_policy, make_group, tmp_path, zero_stage, lora):
    groups = [make_group(seed) for seed in range(2)]
    engine, step = trained_run(tmp_path / "run", config_of(fresh_policy, zero_stage=zero_stage, lora=lora), groups)
    expected = engine.log_probs([scored.group for scored in groups])
    start = PlainLearner(config_of(fresh_policy), num_updates=1).log_probs(groups)
    assert np.abs(expected[0][0] - start[0].numpy()).max() > 0.05
    export(step, "--output", tmp_path / "out", "--shard-gb", "0.002", "--license", "apache-2.0")
    check_policy(str(tmp_path / "out"))
    check_log_probs(tmp_path / "out", groups, expected)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    if zero_stage < 3:  # between its passes a ZeRO-3 engine holds no weights to generate with
        text = greedy(plain, fresh_policy, groups[0].group)
        assert len(text) == 32 and text == greedy(engine._policy.eval(), fresh_policy, groups[0].group)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) >= 4 and all(shard.stat().st_size < 2.2e6 for shard in shards)
    AutoProcessor.from_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "apache-2.0"
    assert ("LoRA of rank 4" in card) == bool(lora.rank)


@pytest.mark.usefixtures("process_group_of_one")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_an_exported_adapter_that_peft_merges_is_the_trained_policy(tiny_policy, make_group, tmp_path, zero_stage):
    groups = [make_group(seed) for seed in range(2)]
    engine, step = trained_run(tmp_path / "run", config_of(tiny_policy, zero_stage=zero_stage, lora=LORA), groups)
    expected = engine.log_probs([scored.group for scored in groups])
    export(step, "--output", tmp_path / "adapter", "--adapter")
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 1e6
    base = AutoModelForImageTextToText.from_pretrained(tiny_policy, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    shutil.copytree(tiny_policy, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    check_log_probs(tmp_path / "merged", groups, expected)
    with pytest.raises(ConfigError, match="is an adapter; merge it first: sif-ray export"):
        check_policy(str(tmp_path / "adapter"))
    export(tmp_path / "adapter", "--output", tmp_path / "again")  # its own file names the base
    check_log_probs(tmp_path / "again", groups, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group_of_one")
async def test_vllm_reads_the_exported_policy_as_it_was_trained(fresh_policy, make_group, tmp_path):
    groups = [make_group(seed) for seed in range(2)]
    trained, step = trained_run(tmp_path / "run", config_of(fresh_policy, lora=LORA), groups)
    export(step, "--output", tmp_path / "out")
    engine = RolloutEngine(
        str(tmp_path / "out"), EngineConfig(max_model_len=512, kv_cache_gib=0.25), PromptConfig(), dtype="float32"
    )
    await engine.start()
    try:
        sampled, chosen = [
            await engine.generate(
                RolloutRequest("test", "test", "Which?", groups[0].group.images, num_rollouts, sampling, seed=1)
            )
            for num_rollouts, sampling in [(4, SamplingConfig(max_tokens=32)), (1, SamplingConfig(0.0, max_tokens=32))]
        ]
    finally:
        await engine.shutdown()
    [expected] = trained.log_probs([sampled])
    for rollout, logprobs_T in zip(sampled.rollouts, expected, strict=True):
        np.testing.assert_allclose(rollout.logprobs_T, logprobs_T, atol=1e-3)
    assert chosen.rollouts[0].token_ids_T.tolist() == greedy(trained._policy.eval(), fresh_policy, chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group_of_one")
@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["whole", "lora"])
def test_what_two_ranks_divided_is_joined(ray_local, tiny_policy, make_group, tmp_path, lora):
    groups = [make_group(seed) for seed in range(2)]
    config = config_of(tiny_policy, num_ranks=2, zero_stage=3, num_cpus_per_rank=0.5, lora=lora)
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    step.mkdir(parents=True)

    async def train():
        learner = LearnerGroup(config)
        try:
            await learner.start(total_steps=4)
            await learner.train(groups, 0)
            await learner.save_checkpoint(str(step / "learner"), {"version": 1})
            return await learner.log_probs([scored.group for scored in groups])
        finally:
            learner.shutdown()

    expected = asyncio.run(train())
    write_settings(tmp_path / "run", config)
    export(step, "--output", tmp_path / "out")
    check_log_probs(tmp_path / "out", groups, expected)
    export(step, "--output", tmp_path / "universal", "--universal")
    alone = engine_of(dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_ranks=1)))
    load_universal(alone, tmp_path / "universal")
    found = alone.log_probs([scored.group for scored in groups])
    for found_G, expected_G in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.concatenate(found_G), np.concatenate(expected_G), atol=1e-4)


def load_universal(engine: LearnerEngine, folder: Path) -> None:
    """As any DeepSpeed program does, with {"checkpoint": {"load_universal": true}} in its configuration."""
    engine._engine._config.load_universal_checkpoint = True
    engine._engine.load_checkpoint(str(folder), load_module_strict=False)


@pytest.mark.usefixtures("process_group_of_one")
def test_a_universal_checkpoint_goes_on_as_the_trained_engine_does(tiny_policy, make_group, tmp_path):
    groups = [make_group(seed) for seed in range(2)]
    config = config_of(tiny_policy, zero_stage=2)
    trained, step = trained_run(tmp_path / "run", config, groups)
    export(step, "--output", tmp_path / "universal", "--universal")
    fresh = engine_of(config)
    load_universal(fresh, tmp_path / "universal")
    assert fresh.step == 2
    for engine in (trained, fresh):
        engine.train_step(groups, 2)  # with the moments of Adam, which are in the checkpoint too
    for found, expected in zip(*(e.log_probs([groups[0].group])[0] for e in (fresh, trained)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("process_group_of_one")
def test_a_universal_checkpoint_of_zero_3_holds_weights_and_moments(tiny_policy, make_group, tmp_path):
    """Not by a further step: DeepSpeed 0.19 gives all groups of weights one counter of steps, so torch's AdamW counts
    each step twice after such a load."""
    groups = [make_group(seed) for seed in range(2)]
    config = config_of(tiny_policy, zero_stage=3)
    trained, step = trained_run(tmp_path / "run", config, groups)
    export(step, "--output", tmp_path / "universal", "--universal")
    fresh = engine_of(config)
    load_universal(fresh, tmp_path / "universal")
    for found, expected in zip(*(e.log_probs([groups[0].group])[0] for e in (fresh, trained)), strict=True):
        np.testing.assert_array_equal(found, expected)
    for (name, own), other in zip(fresh._policy.named_parameters(), trained._policy.parameters(), strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            found, expected = (safe_get_full_optimizer_state(weight, moment) for weight in (own, other))
            torch.testing.assert_close(found, expected, atol=0, rtol=0, msg=f"{moment} of {name}")


def test_an_adapter_in_the_layout_of_llama_factory_is_merged(tiny_policy, tmp_path):
    """Older names of the layers, targets as a regular expression, rank-stabilised, a whole layer beside the adapter."""
    base = AutoModelForImageTextToText.from_pretrained(tiny_policy, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=r"^(?!.*visual).*(?:q_proj|down_proj).*",
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=tiny_policy,
    )
    model = peft.get_peft_model(base, settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    rename(tmp_path / "adapter" / "adapter_model.safetensors", "model.language_model.layers", "model.layers")
    export(tmp_path / "adapter", "--output", tmp_path / "out", "--base", tiny_policy)
    found = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "out").named_parameters())
    start = dict(AutoModelForImageTextToText.from_pretrained(tiny_policy).named_parameters())
    expected = dict(model.merge_and_unload().named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)
    changed = {name for name, value in found.items() if not torch.equal(value, start[name])}
    assert len(changed) == 2 * 4 + 1 and "lm_head.weight" in changed


def rename(file: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)


@pytest.mark.usefixtures("process_group_of_one")
def test_requests_that_cannot_work_are_refused_before_anything_is_written(tiny_policy, make_group, tmp_path):
    _, step = trained_run(tmp_path / "run", config_of(tiny_policy), [make_group(0)])
    other = tmp_path / "other"
    shutil.copytree(tiny_policy, other)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["depth"] = 2
    (other / "config.json").write_text(json.dumps(config))
    (tmp_path / "there").mkdir()
    lonely = shutil.copytree(step, tmp_path / "alone" / "step")
    for arguments, message in [
        ((step, "--output", tmp_path / "there"), "exists; name a folder that does not"),
        ((step, "--adapter"), "has no adapter"),
        ((step, "--base", other), r"holds model\.visual\.blocks\.2\..*, which the base .* has not; .*--base"),
        ((step, "--base", tmp_path / "nowhere"), "--base = .* is neither a folder nor"),
        ((lonely,), "no config.yaml that names the policy it began with; give --base"),
        ((tmp_path / "there",), r"checkpoint: .*config\.json is missing"),
        ((tiny_policy, "--universal"), "is no training checkpoint"),
        ((tiny_policy, "--adapter"), "has no adapter"),
        ((tiny_policy, "--shard-gb", "0"), "--shard-gb 0: must be positive"),
    ]:
        out = () if "--output" in arguments else ("--output", tmp_path / "out")
        with pytest.raises(ConfigError, match=message):
            export(*arguments, *out)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.usefixtures("process_group_of_one")
@pytest.mark.parametrize("form", [(), ("--universal",)], ids=["merged", "universal"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_checkpoint_that_the_disk_has_damaged_is_not_exported(tiny_policy, make_group, tmp_path, zero_stage, form):
    _, step = trained_run(tmp_path / "run", config_of(tiny_policy, zero_stage=zero_stage), [make_group(0)])
    reads_all = zero_stage == 3 or form
    files = sorted(step.rglob("*.pt" if reads_all else "mp_rank_00_model_states.pt"))
    assert len(files) == (3 if reads_all else 1)
    for file in files:
        content = file.read_bytes()
        half = len(content) // 2
        for damaged in (b"", content[:half], content[:half] + bytes([content[half] ^ 0x10]) + content[half + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(ConfigError, match=rf"{file.name}: damaged .* export the checkpoint before it"):
                export(step, "--output", tmp_path / "out", *form)
        file.write_bytes(content)
    assert not list(tmp_path.glob("out*"))
    export(step, "--output", tmp_path / "out", *form)


def test_a_policy_is_written_again_in_another_type_and_names_stay_those_of_the_base(tiny_policy, tmp_path):
    export(tiny_policy, "--output", tmp_path / "out", "--dtype", "bfloat16")
    with (
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as found,
        safe_open(Path(tiny_policy) / "model.safetensors", "pt") as start,
    ):
        assert set(found.keys()) == set(start.keys())
        for name in start.keys():  # noqa: SIM118
            assert torch.equal(found.get_tensor(name), start.get_tensor(name).bfloat16())
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
