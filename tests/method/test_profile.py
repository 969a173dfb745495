from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from sif_ray.method.profile import CORRECTED, PUBLISHED, ProfileError, resolve


def test_resolve() -> None:
    assert resolve("published") is PUBLISHED
    assert resolve("corrected") is CORRECTED
    own = dataclasses.replace(CORRECTED, name="own", box_bonus_cap=0.0)
    assert resolve(own) is own


@pytest.mark.parametrize("bad", ["Published", "", None, 3, ["corrected"]])
def test_unknown_profiles_are_refused_with_the_way_out(bad: object) -> None:
    with pytest.raises(ProfileError, match="published, corrected"):
        resolve(bad)


def test_profiles_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CORRECTED.name = "other"


def test_the_method_imports_no_engine_and_nothing_else_of_ours() -> None:
    code = (
        "import pkgutil, sys, importlib, sif_ray.method as m\n"
        "[importlib.import_module(f'sif_ray.method.{i.name}') for i in pkgutil.iter_modules(m.__path__)]\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "ours = [n for n in sys.modules if n.startswith('sif_ray.') and not n.startswith('sif_ray.method')]\n"
        "sys.exit(f'{heavy} {ours}' if heavy or ours else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
