"""LoRA, a frozen vision tower, recomputed activations, bfloat16 and offloading: what of the policy moves, and how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sif_ray.config import ConfigError, GrpoConfig, LearnerConfig, LoraConfig, ObjectiveConfig, validate
from sif_ray.learner.engine import LearnerEngine, LearnerError
from sif_ray.policy.model import load_policy

RATE, BETA = 1e-3, 0.1
LORA = LoraConfig(rank=4, alpha=16.0)

pytestmark = pytest.mark.usefixtures("process_group_of_one")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def groups(make_group):
    return [make_group(0), make_group(1, (4, 11)), make_group(2, (6, 6, 6))]


@pytest.fixture(scope="module")
def start(tiny_policy):
    return {name: value.detach().clone() for name, value in load_policy(tiny_policy).named_parameters()}


def engine_of(tiny_policy, beta=0.0, **learner) -> LearnerEngine:
    settings = {"learning_rate": RATE, "lr_schedule": "constant"} | learner
    return LearnerEngine(
        LearnerConfig(**settings), tiny_policy, total_steps=10, objective=ObjectiveConfig(kl_beta=beta)
    )


def published(engine) -> dict[str, torch.Tensor]:
    return dict(pair for bucket in engine.weight_buckets(bucket_bytes=300_000) for pair in bucket)


def own_parameters(engine) -> dict[str, torch.Tensor]:
    """The policy's parameters as the engine trains them, adapters beside their base weights."""
    import deepspeed

    policy = engine._policy
    with deepspeed.zero.GatheredParameters(list(policy.parameters()), enabled=engine._config.zero_stage == 3):
        return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("zero_stage", [0, slow(2), 3])
def test_lora_publishes_merged_weights_and_takes_the_policy_without_adapters_as_reference(
    tiny_policy, groups, start, merge_by_peft, zero_stage, tmp_path
):
    engine = engine_of(tiny_policy, BETA, zero_stage=zero_stage, lora=LORA, micro_batch_tokens=150)
    first = engine.train_step(groups, version=0)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    before = own_parameters(engine)
    found = published(engine)
    merged = merge_by_peft(before, LORA.alpha)
    assert list(found) == list(merged) == list(start)
    for name, value in found.items():
        torch.testing.assert_close(value, merged[name], atol=1e-7, rtol=0, msg=name)
        adapted = f"{name.removesuffix('.weight')}.lora_A.default.weight" in before
        assert torch.equal(value, start[name]) != adapted, name
    after = own_parameters(engine)
    assert all(torch.equal(after[name], before[name]) for name in before)
    engine.save_policy(str(tmp_path / "policy"))
    saved = load_policy(str(tmp_path / "policy"))
    assert all(torch.equal(value, found[name]) for name, value in saved.named_parameters())

    ours = [scored.group for scored in groups]
    logprobs = LearnerEngine(LearnerConfig(), str(tmp_path / "policy"), total_steps=1).log_probs(ours)
    reference = LearnerEngine(LearnerConfig(), tiny_policy, total_steps=1).log_probs(ours)
    differences = flat(reference) - flat(logprobs)
    second = engine.train_step(groups, version=0)
    assert second["kl"] == pytest.approx((np.exp(differences) - differences - 1).mean(), rel=1e-3)
    assert second["kl"] > 1e-3


def flat(logprobs) -> np.ndarray:
    return np.concatenate([rollout_T.astype(np.float64) for rollouts in logprobs for rollout_T in rollouts])


@pytest.mark.parametrize("zero_stage", [2, slow(3)])
def test_lora_with_dropout_resumes_exactly(tiny_policy, groups, tmp_path, zero_stage):
    lora = LoraConfig(rank=4, dropout=0.3)
    saved = engine_of(tiny_policy, BETA, zero_stage=zero_stage, lora=lora)
    saved.train_step(groups, version=0)
    saved.save_checkpoint(str(tmp_path), {})
    expected = saved.train_step(groups, version=0)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    assert size < 13 * 4 * sum(value.numel() for name, value in own_parameters(saved).items() if "lora_" in name)
    resumed = engine_of(tiny_policy, BETA, zero_stage=zero_stage, lora=lora)
    resumed.load_checkpoint(str(tmp_path))
    assert resumed.train_step(groups, version=0) == expected
    found, wanted = own_parameters(resumed), own_parameters(saved)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(LearnerError, match=r"lora and freeze_vision"):
        engine_of(tiny_policy, zero_stage=zero_stage).load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("frozen", [False, True])
def test_the_vision_tower_is_published_whether_it_is_trained_or_not(tiny_policy, groups, start, frozen):
    engine = engine_of(tiny_policy, freeze_vision=frozen)
    engine.train_step(groups, version=0)
    found = published(engine)
    assert list(found) == list(start)
    vision = {name for name in start if name.startswith("model.visual.")}
    moved = {name for name in start if not torch.equal(found[name], start[name])}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in moved
    assert bool(moved & vision) != frozen
    assert frozen or {"model.visual.patch_embed.proj.weight", "model.visual.merger.mlp.2.weight"} <= moved


@pytest.mark.parametrize(("zero_stage", "lora"), [(0, LoraConfig()), slow(3, LoraConfig()), (3, LORA)])
def test_recomputed_activations_change_no_gradient(tiny_policy, groups, zero_stage, lora):
    steps, passes = [], []
    for recompute in (False, True):
        engine = engine_of(
            tiny_policy, gradient_checkpointing=recompute, zero_stage=zero_stage, lora=lora, max_grad_norm=1e9
        )
        counts = [count_passes(engine._policy, name) for name in ("model.language_model.layers.1", "lm_head")]
        metrics = engine.train_step(groups, version=0)
        steps.append((metrics, published(engine)))
        passes.append([len(count) for count in counts])
    assert passes == [[1, 16], [2, 16]]  # the layer again for the backward pass; the output layer always, in 8 parts
    (plain, wanted), (found_metrics, found) = steps
    assert found_metrics == pytest.approx(plain, rel=1e-5)
    differences = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
    assert (differences < 1e-7).float().mean() > 0.97  # elsewhere the gradient is rounding and Adam makes a step of it
    assert differences.max() < 2.1 * RATE


def count_passes(policy, name: str) -> list[None]:
    passes: list[None] = []
    module = policy.get_submodule(name)
    module.register_forward_pre_hook(lambda *_: passes.append(None))
    return passes


@pytest.mark.parametrize("zero_stage", [slow(0), 2, slow(3)])
def test_bfloat16_keeps_steps_that_are_smaller_than_its_own(tiny_policy, groups, zero_stage):
    engine = engine_of(tiny_policy, BETA, zero_stage=zero_stage, dtype="bfloat16", learning_rate=4e-4)
    before = published(engine)
    coarse = {name: (value.abs() >= 0.5) & (value.abs() < 1) for name, value in before.items()}  # spacing 1 / 256
    assert {value.dtype for value in before.values()} == {torch.bfloat16}
    moved = []
    for _ in range(8):
        engine.train_step(groups, version=0)
        after = published(engine)
        moved.append(sum(int((after[name] != before[name])[coarse[name]].sum()) for name in after))
    assert moved[0] == 0  # one step is lost in the weights' own rounding, eight are not
    assert moved[-1] > 10
    assert {value.dtype for value in after.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("zero_stage", "zero_options"),
    [
        (2, {"offload_optimizer": {"device": "cpu"}}),
        slow(3, {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
    ],
)
def test_options_of_deepspeed_are_passed_through_and_offloading_changes_nothing(
    tiny_policy, groups, zero_stage, zero_options
):
    options = {"zero_optimization": zero_options}
    engine = engine_of(tiny_policy, BETA, zero_stage=zero_stage, deepspeed=options)
    assert engine._engine.zero_cpu_offload()
    plain = engine_of(tiny_policy, BETA, zero_stage=zero_stage)
    for _ in range(2):
        assert engine.train_step(groups, version=0) == pytest.approx(plain.train_step(groups, version=0), rel=1e-4)
    found, wanted = published(engine), published(plain)
    differences = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
    assert (differences < 1e-6).float().mean() > 0.97


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": LoraConfig(rank=8, targets="vision")}, r"lora.targets = 'vision'"),
        ({"lora": LoraConfig(rank=8, targets="all"), "freeze_vision": True}, r"freeze_vision = True.*lora.targets"),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, r"learner.deepspeed = .*optimiser"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, r"learner.deepspeed = .*ZeRO stage"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        validate(GrpoConfig(learner=LearnerConfig(**change)))
