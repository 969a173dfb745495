"""Full updates of the learner against plain PyTorch (reference.py): losses, gradients and weights in float32.

The policy is freshly initialised: the trained toy is so steep that float32 itself is right to 1e-4 only. Gradients are
compared at the learner's own weights of each update, so that rounding does not add up.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from reference import PlainLearner

from sif_ray.config import GrpoConfig, LearnerConfig, ObjectiveConfig, SamplingConfig
from sif_ray.learner import process_group
from sif_ray.learner.engine import LearnerEngine
from sif_ray.records import ScoredGroup

pytestmark = pytest.mark.usefixtures("process_group_of_one")

TOLERANCE = 1e-5  # relative, of a loss and of the gradient of a tensor
TOTAL_UPDATES = 4  # of the learning-rate schedule
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def groups(make_group) -> list[ScoredGroup]:
    return [make_group(0), make_group(1, (4, 11)), make_group(2, (6, 6, 6)), make_group(3, (30, 2, 12))]


def config_of(policy: str, zero_stage: int = 0, **objective: Any) -> GrpoConfig:
    """Two updates per batch, so that ratios and the KL are not those of equal policies; micro-batches cut groups."""
    return GrpoConfig(
        policy=policy,
        objective=ObjectiveConfig(**({"updates_per_batch": 2} | objective)),
        sampling=SamplingConfig(temperature=0.8, max_tokens=40),
        learner=LearnerConfig(
            learning_rate=1e-3, max_grad_norm=0.5, weight_decay=10.0, zero_stage=zero_stage, micro_batch_tokens=150
        ),
    )


# --- what the learner did --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """Of one batch: losses, and weights and gradients right before the weights change, by update; the last weights."""

    losses: list[float]
    norms: list[float]
    gradients: list[Weights]
    weights: list[Weights]
    metrics: dict[str, float]


def train_recorded(config: GrpoConfig, groups: list[ScoredGroup]) -> Record:
    engine = LearnerEngine(
        config.learner,
        config.policy,
        total_steps=TOTAL_UPDATES,
        objective=config.objective,
        sampling=config.sampling,
    )
    from deepspeed.utils import safe_get_full_grad  # after the engine has told DeepSpeed its device

    record = Record([], [], [], [], {})
    step, update = engine._engine.step, engine._update

    def weights_now() -> Weights:
        return dict(pair for bucket in engine.weight_buckets() for pair in bucket)

    def step_recorded() -> None:
        record.weights.append(weights_now())
        record.gradients.append({name: safe_get_full_grad(p).clone() for name, p in engine._policy.named_parameters()})
        step()

    def update_recorded(*arguments: Any) -> dict[str, float]:
        sums = update(*arguments)
        record.losses.append(sums["loss"])
        record.norms.append(sums["grad_norm"])
        return sums

    engine._engine.step, engine._update = step_recorded, update_recorded
    record.metrics = engine.train_step(groups, version=0)
    record.weights.append(weights_now())
    return record


def run_rank(rank: int, config: GrpoConfig, shares: list[list[ScoredGroup]], folder: str) -> None:
    """In a process of its own. The first rank writes what it recorded."""
    process_group.join(rank, len(shares), dist.FileStore(f"{folder}/store", len(shares)))
    record = train_recorded(config, shares[rank])
    if rank == 0:
        torch.save(dataclasses.asdict(record), f"{folder}/record.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_on_two_ranks(config: GrpoConfig, groups: list[ScoredGroup], folder: Path) -> Record:
    shares = [groups[:1], groups[1:]]  # one rank has fewer micro-batches than the other
    torch.multiprocessing.spawn(run_rank, args=(config, shares, str(folder)), nprocs=len(shares))
    return Record(**torch.load(folder / "record.pt"))


# --- against the reference -------------------------------------------------------------------------------------------


def assert_gradients_of_reference(record: Record, config: GrpoConfig, groups: list[ScoredGroup]) -> None:
    plain = PlainLearner(config, TOTAL_UPDATES)
    proximal = plain.log_probs(groups)
    updates = list(zip(record.losses, record.norms, record.gradients, record.weights[:-1], strict=True))
    assert len(updates) == config.objective.updates_per_batch
    for loss, norm, gradients, weights in updates:
        plain.load(weights)
        expected = plain.gradients(groups, proximal)
        assert loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=5e-7)  # terms of size 1, rounded, cancel to it
        assert norm == pytest.approx(expected.grad_norm, rel=TOLERANCE)
        assert gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert (gradients[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def assert_weights_of_reference(record: Record, config: GrpoConfig, groups: list[ScoredGroup]) -> None:
    plain = PlainLearner(config, TOTAL_UPDATES)
    plain.train(groups)
    moved = []
    for name, expected in plain.policy.named_parameters():
        torch.testing.assert_close(record.weights[-1][name], expected.detach(), atol=1e-4, rtol=0, msg=name)
        moved.append((record.weights[-1][name] - record.weights[0][name]).abs().flatten())
    assert torch.cat(moved).mean() > 1e-3  # so the tolerance tells right from wrong


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("zero_stage", "num_ranks"),
    [
        (0, 1),
        pytest.param(2, 1, marks=slow),
        pytest.param(3, 1, marks=slow),
        pytest.param(0, 2, marks=slow),
        pytest.param(2, 2, marks=slow),
        (3, 2),
    ],
)
def test_updates_are_those_of_plain_pytorch(fresh_policy, groups, tmp_path, zero_stage, num_ranks):
    config = config_of(fresh_policy, zero_stage)
    record = train_recorded(config, groups) if num_ranks == 1 else train_on_two_ranks(config, groups, tmp_path)
    assert_gradients_of_reference(record, config, groups)
    assert_weights_of_reference(record, config, groups)


@pytest.mark.parametrize(
    "objective",
    [
        {"loss_mean": "token"},
        {"loss_mean": "constant", "advantage_norm": "mean"},
        {"clip_low": 0.05, "clip_high": 0.3},
        {"surrogate": "gspo", "clip_low": 0.01, "clip_high": 0.02},
        {"surrogate": "cispo", "clip_low": 1.0},
        {"ratio_to": "behaviour", "updates_per_batch": 1},
        {"surrogate": "gspo", "ratio_to": "behaviour", "updates_per_batch": 1},
        {"importance_cap": 0.0, "kl_beta": 0.0},
    ],
    ids=lambda objective: " ".join(map(str, objective.values())),
)
def test_every_variant_has_the_gradient_of_plain_pytorch(fresh_policy, groups, objective):
    config = config_of(fresh_policy, **objective)
    record = train_recorded(config, groups[:3])
    assert record.metrics["clip_share"] > 0
    assert_gradients_of_reference(record, config, groups[:3])
