"""The parity probe: engines against the learner on the same tokens under the same weights.

What differs then is numerics and errors of the weight transfer, not staleness.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import numpy as np

from sif_ray.config import GrpoConfig
from sif_ray.loop.pool import WorkerDiedError
from sif_ray.loop.requests import Ask, check_version, probe_request
from sif_ray.records import FloatArray, RolloutGroup, Sample
from sif_ray.rollout.errors import RolloutRequestError

log = logging.getLogger(__name__)

LogProbs = Callable[[Sequence[RolloutGroup]], Awaitable[list[list[FloatArray]]]]


async def probe_parity(
    config: GrpoConfig, sample: Sample, version: int, engines: Mapping[str, Ask], log_probs: LogProbs
) -> dict[str, float]:
    """Mean |log-prob of the engine - log-prob of the learner| over fresh tokens, of the engine where it is largest.

    `engines` by name and the learner, asked by `log_probs`, hold `version` until this returns. Engines that die under
    the probe or refuse its sample do not count; {} when none is left. Raises `VersionError`, and warns above
    `parity_alarm`.
    """
    probed: dict[str, RolloutGroup] = {}

    async def probe(name: str, ask: Ask) -> None:
        try:
            group = await ask(probe_request(config, sample, f"probe/{version}/{name}"))
        except WorkerDiedError:
            return
        except RolloutRequestError as error:
            log.warning("version %d: %s was not probed: %s", version, name, error)
            return
        check_version(group, version, f"{name} was probed at version {version}")
        probed[name] = group

    async with asyncio.TaskGroup() as probes:
        for name, ask in engines.items():
            probes.create_task(probe(name, ask))
    if not probed:
        return {}
    learner_logprobs = await log_probs(list(probed.values()))
    delta, name = max(
        (_mean_delta(group, own), name) for (name, group), own in zip(probed.items(), learner_logprobs, strict=True)
    )
    if not delta <= config.parity_alarm:
        log.warning(
            "version %d: log-probs of %s and the learner differ by %.4g in the mean (parity_alarm = %g)",
            version,
            name,
            delta,
            config.parity_alarm,
        )
    return {"parity_mean_abs": delta}


def _mean_delta(group: RolloutGroup, logprobs: Sequence[FloatArray]) -> float:
    pairs = zip(group.rollouts, logprobs, strict=True)
    return float(np.mean(np.concatenate([abs(rollout.logprobs_T - own_T) for rollout, own_T in pairs])))
