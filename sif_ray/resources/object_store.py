"""What a GRPO run has in Ray's object store at most, judged before it starts.

Weights: the published update, and beside it one that an engine still loads. Groups: the ledger's window lets
`(max_staleness + 1) * groups_per_step` of them live; their images travel encoded and by value, with the request to the
engine, back with the group, and to the learner with the batch. Ray forgets a call's values when the call is done, so a
group is there twice at most: in a call of its own and in a batch. Between calls it lives in the driver.
"""

from __future__ import annotations

from collections.abc import Iterable

from sif_ray.config import ConfigError, GrpoConfig
from sif_ray.records import Sample
from sif_ray.resources.memory import bytes_per_weight

MIB = 2**20
UPDATES = 2
COPIES_OF_A_GROUP = 2
BYTES_PER_TOKEN = 16  # id, log-prob, and about as much of text and overhead


def weights_bytes(config: GrpoConfig, num_parameters: int) -> int:
    """Bytes of weight updates: none where they are sent over process groups."""
    return (
        UPDATES * num_parameters * bytes_per_weight(config.learner) if config.weight_transfer == "object_store" else 0
    )


def groups_bytes(config: GrpoConfig, samples: Iterable[Sample]) -> int:
    """Bytes of all groups that may live, if each had the largest images and the longest completions."""
    live = (config.max_staleness + 1) * config.groups_per_step
    depth = config.prompt.depth_image
    images = max((sum(map(len, sample.prompt_images(depth))) for sample in samples), default=0)
    tokens = config.group_size * config.sampling.max_tokens * BYTES_PER_TOKEN
    return COPIES_OF_A_GROUP * live * (images + tokens)


def check_object_store(config: GrpoConfig, num_parameters: int | None, samples: Iterable[Sample]) -> None:
    """Raise `ConfigError` when the bound exceeds the object store of the cluster that the run starts for itself.

    Ray would not fail: it would write to disk and become slow. `num_parameters` None = unknown, not judged. The store
    of a cluster that is joined is its administrator's.
    """
    if not config.ray.local:
        return
    weights, groups = weights_bytes(config, num_parameters or 0), groups_bytes(config, samples)
    if weights + groups > config.ray.object_store_mib * MIB:
        raise ConfigError(
            f"ray.object_store_mib = {config.ray.object_store_mib}: {UPDATES} weight updates take up to "
            f"{weights / MIB:.0f} MiB and the groups of (max_staleness + 1) * groups_per_step = "
            f"{(config.max_staleness + 1) * config.groups_per_step} prompts {groups / MIB:.0f} MiB; raise it to "
            f"{-(-(weights + groups) // MIB)}, or lower max_staleness, groups_per_step or sampling.max_tokens"
        )
