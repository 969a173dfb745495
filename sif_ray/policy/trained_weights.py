"""The trained weights in a checkpoint of the learner, tensor by tensor, whatever the ZeRO stage and number of ranks.

The files are DeepSpeed's and can run code when they are read: export only checkpoints of your own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sif_ray.config import ConfigError
from sif_ray.policy.torch_files import check_intact

_MODULE = "policy."  # the learner's module holds the policy under this name
_WHOLE = "mp_rank_00_model_states.pt"


class TrainedWeights(Mapping[str, torch.Tensor]):
    """Trained weights by parameter name. A tensor is put together when it is asked for: the files are mapped into
    memory, and a model that was divided among ranks is never whole.

    Example: `TrainedWeights(find_learner(Path("runs/grpo/checkpoints/step-000012")))["lm_head.weight"]`.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` has DeepSpeed's file `latest`. Its files are read for their checksums. Raises `ConfigError` for
        files that are missing or damaged."""
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        whole = folder / tag / _WHOLE
        if whole.is_file():  # up to ZeRO-2 every rank holds all weights, and the first has written them
            check_intact([whole])
            tensors = torch.load(whole, map_location="cpu", mmap=True, weights_only=False)["module"]
        else:
            check_intact(sorted((folder / tag).glob("*.pt")))
            tensors = _divided(folder, tag)
        self._tensors: dict[str, Any] = {name.removeprefix(_MODULE): value for name, value in tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._tensors[name].contiguous()
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without putting it together."""
        return tuple(self._tensors[name].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def find_learner(folder: Path) -> Path | None:
    """The folder with DeepSpeed's `latest` in a checkpoint of warm-up or GRPO, or `folder` itself; None without one."""
    return next((place for place in (folder, folder / "learner") if (place / "latest").is_file()), None)


def _divided(folder: Path, tag: str) -> Mapping[str, Any]:
    """Under ZeRO-3 each rank has a part of every weight; DeepSpeed's reader gives tensors that join them on demand."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag, exclude_frozen_parameters=True, lazy_mode=True
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / tag}: {error}; copy the whole checkpoint, the files of every rank") from error
