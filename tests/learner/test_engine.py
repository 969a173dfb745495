"""One rank of the learner: what it reports, reads, saves and refuses. Its updates are tested in test_reference.py."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from reference import PlainLearner

from sif_ray.config import GrpoConfig, LearnerConfig, LoraConfig, ObjectiveConfig, SamplingConfig
from sif_ray.learner.engine import LearnerEngine, LearnerError
from sif_ray.policy.branches import BranchedSequence
from sif_ray.policy.model import load_policy
from sif_ray.policy.processor import PolicyProcessor

RATE, BETA = 1e-3, 0.1

pytestmark = pytest.mark.usefixtures("process_group_of_one")


@pytest.fixture(scope="module")
def groups(make_group):
    return batch_of(make_group)


def batch_of(make_group, last_version=0):
    lengths = [(5, 9, 3, 7), (4, 11), (6, 6, 6)]
    return [make_group(seed, lengths_G, last_version) for seed, lengths_G in enumerate(lengths)]


def config_of(policy, **learner) -> GrpoConfig:
    settings = {"learning_rate": RATE, "max_grad_norm": 0.05, "lr_schedule": "constant"} | learner
    return GrpoConfig(policy=policy, learner=LearnerConfig(**settings), sampling=SamplingConfig(temperature=0.7))


def engine_of(policy, objective=None, **learner) -> LearnerEngine:
    config = config_of(policy, **learner)
    return LearnerEngine(config.learner, policy, total_steps=10, objective=objective, sampling=config.sampling)


def test_a_step_counts_its_tokens_and_their_ages(tiny_policy, make_group):
    groups = batch_of(make_group, last_version=1)
    metrics = engine_of(tiny_policy, ObjectiveConfig(kl_beta=BETA)).train_step(groups, version=3)
    assert (metrics["kl"], metrics["clip_share"], metrics["lr"]) == (pytest.approx(0, abs=1e-6), 0, RATE)
    assert metrics["ratio_mean"] == pytest.approx(1)
    tokens, rollouts = 57, 9
    assert metrics["trained_tokens"] == tokens
    # every rollout's last token is of version 1, the others of version 0
    assert (metrics["staleness_max"], metrics["staleness_mean"]) == (3, pytest.approx(3 - rollouts / tokens))
    ages = {name: share for name, share in metrics.items() if name.startswith("staleness/")}
    assert ages == {
        "staleness/0": 0,
        "staleness/1": 0,
        "staleness/2": pytest.approx(rollouts / tokens),
        "staleness/3": pytest.approx(1 - rollouts / tokens),
    }


def test_log_probs_are_those_of_transformers_and_make_the_importance_weight_one(tiny_policy, groups):
    engine = engine_of(tiny_policy, ObjectiveConfig(kl_beta=0.0))
    found = engine.log_probs([scored.group for scored in groups])
    plain = PlainLearner(config_of(tiny_policy), num_updates=1).log_probs(groups)
    for logprobs_T, expected_T in zip(itertools.chain.from_iterable(found), plain, strict=True):
        np.testing.assert_allclose(logprobs_T, expected_T.numpy(), atol=1e-4)
    exact = [with_behaviour(scored, logprobs) for scored, logprobs in zip(groups, found, strict=True)]
    assert engine.train_step(exact, version=0)["is_weight_mean"] == pytest.approx(1, abs=1e-5)


def with_behaviour(scored, logprobs):
    rollouts = tuple(
        dataclasses.replace(rollout, logprobs_T=logprobs_T)
        for rollout, logprobs_T in zip(scored.group.rollouts, logprobs, strict=True)
    )
    return dataclasses.replace(scored, group=dataclasses.replace(scored.group, rollouts=rollouts))


@pytest.mark.parametrize("micro_batch_tokens", [8192, 80])
def test_supervised_step_is_the_mean_over_answer_tokens(fresh_policy, groups, micro_batch_tokens):
    sequences = []
    for scored in groups:
        branches = [rollout.token_ids_T for rollout in scored.group.rollouts]
        sequences.append(
            BranchedSequence(
                prefix_ids=scored.group.prompt_token_ids_P,
                branches=branches,
                pixel_values=PolicyProcessor(fresh_policy).image_features(scored.group.images)["pixel_values"],
                image_grid_thw=scored.group.image_grid_thw,
                loss_masks=[[False, False] + [True] * (len(branch) - 2) for branch in branches],
            )
        )
    config = dataclasses.replace(config_of(fresh_policy), sampling=SamplingConfig(temperature=1.0))
    plain = PlainLearner(config, num_updates=10)
    expected = plain.train_supervised(groups, first=2)
    engine = engine_of(fresh_policy, micro_batch_tokens=micro_batch_tokens)
    metrics = engine.sft_step(sequences)
    assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
    assert metrics["trained_tokens"] == 57 - 2 * 9
    found = weights_of(engine)
    for name, weights in plain.policy.named_parameters():
        torch.testing.assert_close(found[name], weights.detach(), atol=1e-4, rtol=0, msg=name)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return dict(pair for bucket in engine.weight_buckets() for pair in bucket)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_resumed_engine_goes_on_exactly_where_the_saved_one_stood(tiny_policy, groups, tmp_path, zero_stage):
    settings = {"lr_schedule": "linear", "zero_stage": zero_stage}
    saved = engine_of(tiny_policy, ObjectiveConfig(kl_beta=BETA), **settings)
    saved.train_step(groups, version=0)
    saved.save_checkpoint(str(tmp_path / "state"), {"version": 1, "sampled": ["a", "b"]})
    torch_random = torch.rand(3)
    (tmp_path / "state").rename(tmp_path / "moved")
    resumed = engine_of(tiny_policy, ObjectiveConfig(kl_beta=BETA), **settings)
    assert resumed.load_checkpoint(str(tmp_path / "moved")) == {"version": 1, "sampled": ["a", "b"]}
    assert torch.equal(torch.rand(3), torch_random)
    assert resumed.step == 1
    expected = saved.train_step(groups, version=1)
    assert expected["lr"] == pytest.approx(0.9 * RATE)
    assert expected["kl"] > 0  # the reference stays where the run began
    assert resumed.train_step(groups, version=1) == expected
    found, wanted = weights_of(resumed), weights_of(saved)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_run_that_starts_from_an_adapter_has_it_as_its_reference(tiny_policy, groups, tmp_path, zero_stage):
    lora = LoraConfig(rank=4)
    first = engine_of(tiny_policy, lora=lora, zero_stage=zero_stage, objective=ObjectiveConfig(kl_beta=BETA))
    first.train_step(groups, version=0)
    first.save_adapter(str(tmp_path / "adapter"), tiny_policy)
    started = dataclasses.replace(lora, adapter=str(tmp_path / "adapter"))
    second = engine_of(tiny_policy, lora=started, zero_stage=zero_stage, objective=ObjectiveConfig(kl_beta=BETA))
    found, wanted = weights_of(second), weights_of(first)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert second.train_step(groups, version=0)["kl"] == pytest.approx(0, abs=1e-6)
    assert second.train_step(groups, version=1)["kl"] > 1e-5


def test_a_checkpoint_of_another_layout_is_refused(tiny_policy, tmp_path):
    engine_of(tiny_policy, zero_stage=2).save_checkpoint(str(tmp_path), {})
    with pytest.raises(LearnerError, match=r"'zero_stage': 2.*'zero_stage': 0.*resume with the same"):
        engine_of(tiny_policy, zero_stage=0).load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_checkpoint_in_which_a_byte_has_changed_is_refused(tiny_policy, tmp_path, zero_stage):
    engine = engine_of(tiny_policy, zero_stage=zero_stage)
    engine.save_checkpoint(str(tmp_path), {})
    files = sorted(tmp_path.rglob("*.pt"))
    assert len(files) == (3 if zero_stage else 2)
    for file in files:
        content = file.read_bytes()
        for at in (0, len(content) // 2):
            file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
            with pytest.raises(LearnerError, match=rf"{file.name}: damaged .* the one before it"):
                engine.load_checkpoint(str(tmp_path))
        file.write_bytes(content)
    assert engine.load_checkpoint(str(tmp_path)) == {}


def test_saved_policy_is_a_checkpoint_of_the_trained_weights(tiny_policy, groups, tmp_path):
    engine = engine_of(tiny_policy, ObjectiveConfig(kl_beta=0.0), zero_stage=3)
    engine.train_step(groups, version=0)
    engine.save_policy(str(tmp_path / "policy"))
    loaded = dict(load_policy(str(tmp_path / "policy")).named_parameters())
    trained = dict(pair for bucket in engine.weight_buckets(bucket_bytes=200_000) for pair in bucket)
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    start = dict(load_policy(tiny_policy).named_parameters())
    assert not torch.equal(start["lm_head.weight"], trained["lm_head.weight"])
    assert PolicyProcessor(str(tmp_path / "policy")).encode_completion("x") == PolicyProcessor(
        tiny_policy
    ).encode_completion("x")


def test_buckets_keep_to_their_size_and_own_their_tensors(tiny_policy):
    engine = engine_of(tiny_policy)
    buckets = list(engine.weight_buckets(bucket_bytes=500_000))
    assert len(buckets) > 3
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= 500_000 for bucket in buckets)
    buckets[0][0][1].zero_()
    assert next(engine.weight_buckets())[0][1].abs().sum() > 0


def test_what_cannot_be_trained_is_refused(tiny_policy, groups, make_group, tmp_path):
    engine = engine_of(tiny_policy, ObjectiveConfig(kl_beta=0.0))
    with pytest.raises(LearnerError, match="no rank has groups"):
        engine.train_step([], version=0)
    group = dataclasses.replace(groups[0].group, image_grid_thw=((1, 4, 4), (1, 8, 8)))
    with pytest.raises(LearnerError, match=r"sample-0.*max_pixels"):
        engine.train_step([dataclasses.replace(groups[0], group=group)], version=0)
    with pytest.raises(LearnerError, match=r"ticket-0: version 1 .* trains version 0"):
        engine.train_step(batch_of(make_group, last_version=1), version=0)
    unlikely = with_behaviour(groups[0], [np.full_like(r.logprobs_T, -200.0) for r in groups[0].group.rollouts])
    overflowing = engine_of(tiny_policy, ObjectiveConfig(kl_beta=0.0, ratio_to="behaviour"))
    with pytest.raises(LearnerError, match=r"loss is inf.*learning_rate"):
        overflowing.train_step([unlikely], version=0)
    with pytest.raises(LearnerError, match="no checkpoint"):
        engine.load_checkpoint(str(tmp_path / "nothing"))
    with pytest.raises(LearnerError, match="objective"):
        engine_of(tiny_policy).train_step(groups, version=0)
