"""What torch says of itself and of the GPUs, as JSON on stdout: `python -m sif_ray.doctor.torch_probe`.

In a process of its own, as a broken driver may abort it, and as CUDA would hold memory of every GPU until it ends.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any


def look() -> dict[str, Any]:
    """{"torch", "cuda", "available", "warnings", "nccl", "error", "torchvision_error"}: versions, None where absent."""
    found: dict[str, Any] = {"torch": None, "cuda": None, "available": False, "warnings": [], "nccl": None, "error": ""}
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["available"] = torch.cuda.is_available()
        found["warnings"] = [str(warning.message).splitlines()[0] for warning in caught]
        if found["available"]:
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # noqa: BLE001 - whatever torch raises is what was asked for
        found["error"] = f"{type(error).__name__}: {error}"
    found["torchvision_error"] = _import_error()
    return found


def _import_error() -> str:
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # noqa: BLE001 - as above
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    json.dump(look(), sys.stdout)
