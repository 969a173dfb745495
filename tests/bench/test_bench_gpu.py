"""The suite `gpu` where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from sif_ray.bench.gpu import SHAPE, config_of, measure
from sif_ray.config import validate
from sif_ray.resources.placement import lay_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_measures_nothing(caplog):
    findings = measure(1)
    assert findings.goals == []
    assert "no CUDA GPU" in findings.figures["skipped"] and "no CUDA GPU" in caplog.text


def test_its_run_is_one_that_the_layout_takes():
    config = config_of("toy")
    validate(config)
    bundle = lay_out(config).nodes[0][0]
    assert bundle.num_gpus == 1
    assert SHAPE.num_parameters > 3e9
