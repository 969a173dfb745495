"""The set-up: `make` does its work once, the torchvision repair minds its own business, light modules stay light."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("Makefile", "pyproject.toml", "constraints.txt", "tools/repair_torchvision.py")


# --- make ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A checkout whose environment is complete: all that `make` looks at."""
    for name in INPUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
    for name in (".venv/bin/python", ".venv/.installed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_second_env_does_nothing(installed: Path) -> None:
    assert make(installed, "-q", "env").returncode == 0


@pytest.mark.parametrize("target", ["test", "quickstart", "lint"])
def test_targets_install_nothing_where_all_is_installed(installed: Path, target: str) -> None:
    planned = make(installed, "-n", target).stdout
    assert ".venv/bin/" in planned
    assert "pip" not in planned.replace("pipefail", "")


@pytest.mark.parametrize("changed", INPUTS[1:])
def test_a_changed_input_installs_again(installed: Path, changed: str) -> None:
    os.utime(installed / changed)
    os.utime(installed / ".venv/.installed", (1_500_000_000, 1_500_000_000))
    assert "pip" in make(installed, "-n", "test").stdout


def test_an_existing_venv_is_kept(installed: Path) -> None:
    (installed / ".venv/.installed").unlink()
    planned = make(installed, "-n", "env").stdout
    assert "-m venv" not in planned
    assert "-c constraints.txt" in planned


def test_a_wrong_python_is_refused_in_words(installed: Path) -> None:
    shutil.rmtree(installed / ".venv")
    old = installed / "old-python"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 4); $2"\n')
    old.chmod(0o755)
    refused = make(installed, "env", f"PYTHON={old}")
    assert refused.returncode != 0
    assert "needs Python 3.11 or 3.12" in refused.stderr
    assert not (installed / ".venv").exists()


def test_help_names_every_documented_target() -> None:
    shown = make(ROOT, "help").stdout
    for target in ("env", "quickstart", "test", "lint", "clean"):
        assert f"make {target}" in shown


def test_constraints_are_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) == len({line.split("==")[0].lower() for line in pins}) > 100
    for pin in pins:
        assert pin.count("==") == 1 and "+" not in pin and "@" not in pin and "/" not in pin, pin


# --- torchvision repair ----------------------------------------------------------------------------------------------


@pytest.fixture
def repair_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("repair_torchvision", ROOT / "tools/repair_torchvision.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROKEN = "RuntimeError: operator torchvision::nms does not exist"


@pytest.mark.parametrize(
    ("without_hook", "with_hook", "hook_stays"),
    [("", "", False), (BROKEN, "", True), (BROKEN, "still broken", False), ("No module named torchvision", "", False)],
    ids=["works", "mended", "not mended", "another fault"],
)
def test_repair_writes_only_what_mends(
    repair_module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_hook: str,
    with_hook: str,
    hook_stays: bool,
) -> None:
    monkeypatch.setattr(
        repair_module, "import_error", lambda *, hook_enabled: with_hook if hook_enabled else without_hook
    )
    mended = without_hook == "" or hook_stays
    for _ in range(2):  # the second run finds what the first left
        assert repair_module.main(["--site-packages", str(tmp_path)]) == (0 if mended else 1)
        assert len(list(tmp_path.iterdir())) == (2 if hook_stays else 0)
    assert repair_module.main(["--remove", "--site-packages", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


def test_repair_leaves_once_torchvision_works(
    repair_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, content in repair_module.hook_files(tmp_path).items():
        path.write_text(content)
    monkeypatch.setattr(repair_module, "import_error", lambda *, hook_enabled: "")
    assert repair_module.main(["--site-packages", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())


FAKE_TORCHVISION = {
    "torchvision/__init__.py": "from . import extension\nfrom . import _meta_registrations\n",
    "torchvision/extension.py": "def _has_ops():\n    return {has_ops}\n",
    "torchvision/_meta_registrations.py": "",
    "torch/__init__.py": "from . import library\n",
    "torch/library.py": (
        "defined = []\n"
        "class Library:\n"
        "    def __init__(self, namespace, kind): self.namespace = namespace\n"
        "    def define(self, schema): defined.append(self.namespace + '::' + schema.split('(')[0])\n"
    ),
}


@pytest.mark.parametrize(("has_ops", "defined"), [(True, "[]"), (False, "['torchvision::nms', 'torchvision::qnms']")])
def test_hook_declares_only_what_the_extension_left_out(
    repair_module: ModuleType, tmp_path: Path, has_ops: bool, defined: str
) -> None:
    for name, content in FAKE_TORCHVISION.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content.replace("{has_ops}", str(has_ops)))
    for path, content in repair_module.hook_files(tmp_path).items():
        path.write_text(content)
    program = (
        f"import site, sys; sys.path.insert(0, {str(tmp_path)!r}); site.addsitedir({str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules, 'the hook imported torch before anybody asked for torchvision'\n"
        "import torchvision, torch.library; print(torch.library.defined)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == defined, done.stderr


def test_torchvision_and_the_classes_that_need_it_import_here() -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    assert Qwen2_5_VLForConditionalGeneration.__module__.startswith("transformers.")
    assert Qwen2_5_VLProcessor.__module__.startswith("transformers.")


# --- light modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        "sif_ray.config",
        "sif_ray.records",
        "sif_ray.cli",
        *(
            f"sif_ray.method.{path.stem}"
            for path in sorted((ROOT / "sif_ray/method").glob("*.py"))
            if path.stem != "__init__"
        ),
    ],
)
def test_module_needs_no_heavy_package(module: str) -> None:
    program = (
        f"import sys, {module}\n"
        "print(sorted({'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("module", "unneeded"),
    [
        ("sif_ray.cli", {"scipy"}),
        ("sif_ray.loop.reward_actor", {"torch", "scipy"}),
        ("sif_ray.serve.gateway", {"torch", "scipy"}),
        ("sif_ray.loop.grpo", {"transformers", "ray"}),
        ("sif_ray.rollout.actor", {"transformers", "vllm"}),  # the process of the loop imports it, to place the actor
        ("sif_ray.learner.actor", {"transformers", "deepspeed", "peft"}),  # as well
    ],
)
def test_process_imports_only_what_it_uses(module: str, unneeded: set[str]) -> None:
    program = f"import sys, {module}\nprint(sorted({unneeded} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
