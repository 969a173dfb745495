"""Whether the installed torch can use what the machine has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from sif_ray.doctor.child import run_module
from sif_ray.doctor.finding import Finding, fault, ok

PROBE = "sif_ray.doctor.torch_probe"
LIMIT_S = 60.0

_CUDA_BUILD = "install the CUDA build: pip install --force-reinstall torch torchvision -c constraints.txt"


def probe_torch(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`sif_ray.doctor.torch_probe.look`, seeing every GPU: Ray hides them from tasks that ask for none.

    Raises `ChildError` and `TimeoutError`.
    """
    visible = dict(os.environ if environ is None else environ)
    if "RAY_JOB_ID" in visible or not visible.get("CUDA_VISIBLE_DEVICES", "all"):
        visible.pop("CUDA_VISIBLE_DEVICES", None)
    found: dict[str, Any] = json.loads(run_module(PROBE, timeout_s=LIMIT_S, environ=visible))
    return found


def torch_findings(probe: Mapping[str, Any], num_gpus: int, *, run_uses_gpus: bool) -> Iterator[Finding]:
    """`num_gpus`: what the driver's own tool sees."""
    if probe["error"]:
        yield fault("torch", f"does not import: {probe['error']}", "pip install -c constraints.txt torch torchvision")
        return
    if probe["torchvision_error"]:
        yield fault(
            "torchvision",
            f"does not import beside torch {probe['torch']}: {probe['torchvision_error'].splitlines()[0]}",
            "beside a CPU build of torch run python tools/repair_torchvision.py; else install the two of one index",
        )
    else:
        yield ok("torchvision", "imports")
    yield from _cuda(probe, num_gpus, run_uses_gpus=run_uses_gpus)


def _cuda(probe: Mapping[str, Any], num_gpus: int, *, run_uses_gpus: bool) -> Iterator[Finding]:
    build = f"torch {probe['torch']}" + (f" for CUDA {probe['cuda']}" if probe["cuda"] else " for CPUs")
    if not probe["cuda"] and (num_gpus or run_uses_gpus):
        beside = f"beside {num_gpus} GPUs" if num_gpus else "for a run on GPUs"
        yield fault("torch", f"{build} {beside}: it will use none", _CUDA_BUILD)
    elif probe["cuda"] and num_gpus and not probe["available"]:
        why = "; ".join(probe["warnings"]) or "it does not say why"
        yield fault(
            "torch",
            f"{build} cannot use the {num_gpus} GPUs: {why}",
            "update the NVIDIA driver to one for this CUDA version, and give the container its GPUs",
        )
    else:
        yield ok("torch", build + (f", NCCL {probe['nccl']}" if probe["nccl"] else ""))
