"""Modules of the doctor in processes of their own: what aborts or hangs there ends there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_ROOT = str(Path(__file__).parents[2])  # where the package sif_ray lies


class ChildError(RuntimeError):
    """A process that did not end well; the message is the end of what it wrote on stderr."""


def run_module(module: str, given: bytes = b"", *, timeout_s: float, environ: Mapping[str, str] | None = None) -> bytes:
    """What `python -m module` writes on stdout when it gets `given` on stdin.

    Raises `ChildError` where it fails, and `TimeoutError` after `timeout_s`, when it and its children have been ended.
    """
    environ = dict(os.environ if environ is None else environ)
    environ["PYTHONPATH"] = os.pathsep.join([_ROOT, *filter(None, [environ.get("PYTHONPATH", "")])])
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(given, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"no end within {timeout_s:g} s") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode:
        raise ChildError(errors.decode(errors="replace")[-4000:] or f"exit status {process.returncode}")
    return output
