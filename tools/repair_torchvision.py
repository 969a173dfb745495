"""Let torchvision import beside a CPU-only torch.

Where only CUDA builds of torchvision can be had, its compiled extension does not load beside a CPU torch, and
`import torchvision` ends in `operator torchvision::nms does not exist`: the package registers fake kernels for `nms`
and `qnms` without looking whether the extension loaded. transformers' Qwen-VL classes and vLLM import torchvision but
use only its Python side (images, resizing), so declaring the two schemas is enough.

vLLM starts processes of its own and imports torchvision in each before any plug-in is loaded, so the declaration
belongs to the environment: a `.pth` line that every interpreter of this environment runs. It only places an import
hook; nothing is imported until something asks for torchvision, and nothing is declared where the extension did load.

Usage: python tools/repair_torchvision.py [--remove] [--site-packages DIR]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

HOOK_NAME = "_torchvision_schemas"
DISABLE_VARIABLE = "TORCHVISION_SCHEMAS_DISABLED"
MISSING_OPERATOR = "operator torchvision::nms does not exist"

HOOK_SOURCE = f'''"""Declare torchvision's nms and qnms schemas where its compiled extension did not load.

Written by tools/repair_torchvision.py, whose --remove takes it away again.
"""

import os
import sys

LIBRARIES = []  # a torch.library.Library withdraws its schemas when it is collected


class SchemaFinder:
    """Finds nothing: it acts between torchvision's extension module and the modules that register kernels for it."""

    TRIGGERS = ("torchvision._autograd_registrations", "torchvision._meta_registrations")

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.TRIGGERS:
            return None
        sys.meta_path.remove(self)
        if not sys.modules["torchvision.extension"]._has_ops():
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            LIBRARIES.append(library)
        return None


if not os.environ.get("{DISABLE_VARIABLE}"):
    sys.meta_path.insert(0, SchemaFinder())
'''


class RepairError(RuntimeError):
    """torchvision does not import, for a reason this repair does not mend."""


def hook_files(site_packages: Path) -> dict[Path, str]:
    """The two files of the repair, path to content."""
    return {
        site_packages / f"{HOOK_NAME}.py": HOOK_SOURCE,
        site_packages / f"{HOOK_NAME}.pth": f"import {HOOK_NAME}\n",
    }


def import_error(*, hook_enabled: bool) -> str:
    """What `import torchvision` writes to stderr in a fresh interpreter; empty if it works."""
    environment = dict(os.environ)
    environment.pop(DISABLE_VARIABLE, None)
    if not hook_enabled:
        environment[DISABLE_VARIABLE] = "1"
    command = [sys.executable, "-c", "import torchvision"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


def remove(site_packages: Path) -> bool:
    """Delete the repair's files; False if there were none."""
    present = [path for path in hook_files(site_packages) if path.exists()]
    for path in present:
        path.unlink()
    return bool(present)


def repair(site_packages: Path) -> str:
    """Install the hook where torchvision needs it and withdraw it where it does not; returns what was done.

    Raises RepairError where torchvision is absent or fails for another reason, or still fails afterwards.
    """
    error = import_error(hook_enabled=False)
    if not error:
        return f"torchvision imports; {'repair withdrawn' if remove(site_packages) else 'nothing to repair'}"
    if MISSING_OPERATOR not in error:
        raise RepairError(f"torchvision does not import, and not for want of the nms operator:\n{error}")
    for path, content in hook_files(site_packages).items():
        path.write_text(content, encoding="utf-8")
    error = import_error(hook_enabled=True)
    if error:
        remove(site_packages)
        raise RepairError(f"torchvision still does not import with its schemas declared:\n{error}")
    return "torchvision's compiled part does not fit this torch; its nms and qnms schemas are declared on import"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Let torchvision import beside a CPU-only torch.")
    parser.add_argument("--remove", action="store_true", help="take the repair out of this environment")
    parser.add_argument(
        "--site-packages",
        type=Path,
        default=Path(sysconfig.get_path("purelib")),
        help="folder the hook is written to (default: this environment's)",
    )
    options = parser.parse_args(argv)
    if options.remove:
        print("repair removed" if remove(options.site_packages) else "no repair to remove")
        return 0
    try:
        print(repair(options.site_packages))
    except RepairError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
