"""What the loop asks engines for: the rollouts of a ticket, a held-out answer, a parity probe."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from sif_ray.config import GrpoConfig
from sif_ray.records import RolloutGroup, Sample
from sif_ray.rollout.request import RolloutRequest

Ask = Callable[[RolloutRequest], Awaitable[RolloutGroup]]
"""Asks one engine."""

PROBE_ROLLOUTS = 2
PROBE_TOKENS = 64  # per rollout: enough for a mean, and the learner waits for them


class VersionError(RuntimeError):
    """An engine that should have kept its version has answered with another one."""


def groups_per_engine(max_num_seqs: int, group_size: int) -> int:
    """Groups that are asked of an engine at a time: twice as many as it could run whole, and one more.

    A group is there until its longest rollout ends, and the places of those that have ended would stay empty. What an
    engine has no place for waits inside it; it gets older only by the versions under which its tokens are written.
    """
    return 2 * -(-max_num_seqs // group_size) + 1


def training_request(config: GrpoConfig, sample: Sample, ticket_id: str, failures: int = 0) -> RolloutRequest:
    """The G rollouts of a sample. The sampling seed is the same in every run, and another one after every failure of
    the ticket; who is asked again because an engine or the driver has died asks for the same."""
    return RolloutRequest(
        ticket_id=ticket_id,
        sample_id=sample.sample_id,
        question=sample.question,
        images=sample.prompt_images(config.prompt.depth_image),
        num_rollouts=config.group_size,
        sampling=config.sampling,
        seed=_seed(config.seed, ticket_id, failures),
    )


def heldout_request(config: GrpoConfig, sample: Sample, ticket_id: str) -> RolloutRequest:
    """One greedy answer. Urgent, as the engine keeps its version until it has been given."""
    greedy = replace(config.sampling, temperature=0.0, top_p=1.0, top_k=0)
    request = training_request(config, sample, ticket_id)
    return replace(request, num_rollouts=1, sampling=greedy, seed=None, urgent=True)


def probe_request(config: GrpoConfig, sample: Sample, ticket_id: str) -> RolloutRequest:
    """A few short rollouts over the whole vocabulary, which is what the learner's log-probs are over. Urgent, as the
    learner waits for them."""
    tokens = min(PROBE_TOKENS, config.sampling.max_tokens)
    sampling = replace(config.sampling, top_p=1.0, top_k=0, max_tokens=tokens)
    request = training_request(config, sample, ticket_id)
    return replace(request, num_rollouts=PROBE_ROLLOUTS, sampling=sampling, urgent=True)


def check_version(group: RolloutGroup, version: int, what: str) -> None:
    """Raise `VersionError` unless every token of `group` is of `version`."""
    if not group.oldest_version == group.newest_version == version:
        raise VersionError(f"{what}: tokens are of versions {group.oldest_version} to {group.newest_version}")


def _seed(run_seed: int, ticket_id: str, failures: int) -> int:
    words = np.frombuffer(f"{run_seed}/{ticket_id}/{failures}".encode(), dtype=np.uint8)
    return int(np.random.SeedSequence(words.tolist()).generate_state(1)[0] >> 1)
