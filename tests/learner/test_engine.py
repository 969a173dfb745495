"""DeepSpeed steps against plain PyTorch, one completion at a time, with the loss written out again.

Adam divides a gradient by its own size, so where a gradient is nothing but rounding (key biases cannot change
attention) only the size of the step is fixed; weights are compared closely where the gradient is above `NOISE`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sif_ray.config import LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.learner.engine import ADAM_BETAS, LearnerEngine, LearnerError
from sif_ray.policy.branches import BranchedSequence
from sif_ray.policy.model import load_policy
from sif_ray.policy.processor import PolicyProcessor

RATE, MAX_NORM, TEMPERATURE, BETA, CAP = 1e-3, 0.05, 0.7, 0.1, 1.5
NOISE = 1e-5  # of the norm of all gradients


pytestmark = pytest.mark.usefixtures("process_group_of_one")


@pytest.fixture(scope="module")
def groups(make_group):
    return batch_of(make_group)


def batch_of(make_group, last_version=0):
    lengths = [(5, 9, 3, 7), (4, 11), (6, 6, 6)]
    return [make_group(seed, lengths_G, last_version) for seed, lengths_G in enumerate(lengths)]


def engine_of(tiny_policy, objective=None, **learner) -> LearnerEngine:
    settings = {"learning_rate": RATE, "max_grad_norm": MAX_NORM, "lr_schedule": "constant"} | learner
    return LearnerEngine(
        LearnerConfig(**settings),
        tiny_policy,
        total_steps=10,
        objective=objective,
        sampling=SamplingConfig(temperature=TEMPERATURE),
    )


def plain_logprobs(policy, scored, rollout, temperature=TEMPERATURE) -> torch.Tensor:
    """Log-probs of one completion from a forward pass of transformers over prompt and completion alone."""
    features = PolicyProcessor(policy.name_or_path).image_features(scored.group.images)
    prompt = torch.from_numpy(scored.group.prompt_token_ids_P).long()
    completion = torch.from_numpy(rollout.token_ids_T).long()
    ids = torch.cat([prompt, completion])[None]
    logits = policy(
        input_ids=ids,
        mm_token_type_ids=(ids == policy.config.image_token_id).int(),
        pixel_values=torch.from_numpy(np.asarray(features["pixel_values"])),
        image_grid_thw=torch.from_numpy(np.asarray(features["image_grid_thw"])),
    ).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(-1, completion[:, None])[:, 0]


@dataclasses.dataclass
class PlainStep:
    loss: float
    grad_norm: float
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def adamw_step(policy, loss) -> PlainStep:
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, betas=ADAM_BETAS, weight_decay=0.0)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
    optimizer.step()
    return PlainStep(loss.item(), norm.item(), {n: p.detach().clone() for n, p in policy.named_parameters()}, gradients)


@pytest.fixture(scope="module")
def plain_grpo(tiny_policy, groups) -> PlainStep:
    policy = load_policy(tiny_policy)
    losses = []
    for scored in groups:
        rewards = scored.rewards_G.astype(np.float64)
        for rollout, reward in zip(scored.group.rollouts, rewards, strict=True):
            advantage = (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            logprobs = plain_logprobs(policy, scored, rollout)
            weight = (logprobs.detach() - torch.from_numpy(rollout.logprobs_T)).exp().clamp(max=CAP)
            ratio = (logprobs - logprobs.detach()).exp()
            losses.append((-weight * ratio * advantage).mean())  # the KL to the starting policy is 0, and so its slope
    return adamw_step(policy, torch.stack(losses).mean())


def assert_same_weights(engine: LearnerEngine, plain: PlainStep) -> None:
    found = dict(pair for bucket in engine.weight_buckets() for pair in bucket)
    assert list(found) == list(plain.weights)
    for name, weights in found.items():
        certain = plain.gradients[name].abs() > NOISE * plain.grad_norm
        torch.testing.assert_close(weights[certain], plain.weights[name][certain], atol=1e-5, rtol=0, msg=name)
        torch.testing.assert_close(weights, plain.weights[name], atol=2.1 * RATE, rtol=0, msg=name)


@pytest.mark.parametrize(("zero_stage", "micro_batch_tokens"), [(0, 8192), (2, 8192), (2, 100), (3, 250)])
def test_grpo_step_equals_plain_adamw(tiny_policy, make_group, plain_grpo, zero_stage, micro_batch_tokens):
    groups = batch_of(make_group, last_version=1)
    objective = ObjectiveConfig(kl_beta=BETA, importance_cap=CAP)
    engine = engine_of(tiny_policy, objective, zero_stage=zero_stage, micro_batch_tokens=micro_batch_tokens)
    metrics = engine.train_step(groups, version=3)
    assert metrics["loss"] == pytest.approx(plain_grpo.loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(plain_grpo.grad_norm, rel=1e-4)
    assert_same_weights(engine, plain_grpo)
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
    policy = load_policy(tiny_policy)
    with torch.no_grad():
        for scored, logprobs in zip(groups, found, strict=True):
            for rollout, logprobs_T in zip(scored.group.rollouts, logprobs, strict=True):
                np.testing.assert_allclose(logprobs_T, plain_logprobs(policy, scored, rollout).numpy(), atol=1e-4)
    exact = [with_behaviour(scored, logprobs) for scored, logprobs in zip(groups, found, strict=True)]
    assert engine.train_step(exact, version=0)["is_weight_mean"] == pytest.approx(1, abs=1e-5)


def with_behaviour(scored, logprobs):
    rollouts = tuple(
        dataclasses.replace(rollout, logprobs_T=logprobs_T)
        for rollout, logprobs_T in zip(scored.group.rollouts, logprobs, strict=True)
    )
    return dataclasses.replace(scored, group=dataclasses.replace(scored.group, rollouts=rollouts))


@pytest.mark.parametrize("micro_batch_tokens", [8192, 80])
def test_supervised_step_is_the_mean_over_answer_tokens(tiny_policy, groups, micro_batch_tokens):
    policy = load_policy(tiny_policy)
    sequences, logprobs = [], []
    for scored in groups:
        features = PolicyProcessor(tiny_policy).image_features(scored.group.images)
        branches = [rollout.token_ids_T for rollout in scored.group.rollouts]
        masks = [[False, False] + [True] * (len(branch) - 2) for branch in branches]
        sequences.append(
            BranchedSequence(
                scored.group.prompt_token_ids_P,
                branches,
                features["pixel_values"],
                scored.group.image_grid_thw,
                masks,
            )
        )
        logprobs += [plain_logprobs(policy, scored, rollout, temperature=1.0)[2:] for rollout in scored.group.rollouts]
    plain = adamw_step(policy, -torch.cat(logprobs).mean())
    engine = engine_of(tiny_policy, micro_batch_tokens=micro_batch_tokens)
    metrics = engine.sft_step(sequences)
    assert metrics["loss"] == pytest.approx(plain.loss, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(plain.grad_norm, rel=1e-4)
    assert metrics["trained_tokens"] == sum(map(len, logprobs))
    assert_same_weights(engine, plain)


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


def test_a_checkpoint_of_another_layout_is_refused(tiny_policy, tmp_path):
    engine_of(tiny_policy, zero_stage=2).save_checkpoint(str(tmp_path), {})
    with pytest.raises(LearnerError, match=r"'zero_stage': 2.*'zero_stage': 0.*resume with the same"):
        engine_of(tiny_policy, zero_stage=0).load_checkpoint(str(tmp_path))
    (tmp_path / "step0" / "rank0.pt").unlink()
    with pytest.raises(LearnerError, match=r"rank0.pt: missing; resume with the learner.num_ranks"):
        engine_of(tiny_policy, zero_stage=2).load_checkpoint(str(tmp_path))


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
