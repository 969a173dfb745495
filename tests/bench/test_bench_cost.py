"""The suite `cost`: its fits, its figure, and real points so small that their seconds mean nothing."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from sif_ray.bench.cost import Load, exponent, measure

SMALL = Load(
    groups=2, group_size=2, max_tokens=8, widths=(1, 2), group_sizes=(1, 2), ranks=(1, 2), tickets=(8, 80), traces=16
)


def test_the_exponent_of_a_power_is_found():
    assert exponent({size: 3 * size**1.3 for size in (1, 2, 8)}) == pytest.approx(1.3)


@pytest.mark.slow  # starts five small runs
@pytest.mark.timeout(900)
def test_every_size_is_measured_and_drawn(ray_local, tmp_path):
    findings = measure(1, SMALL)
    smallest, wide, *_ = findings.figures["points"]
    assert wide["size"] == "width" and wide["parameters"] > 2 * smallest["parameters"]
    assert [(point["size"], point["times"]) for point in findings.figures["points"][2:]] == [
        ("group size", 2),
        ("engines", 2),
        ("learner ranks", 2),
    ]
    assert len(findings.goals) == len(findings.figures["exponents"]) == 10
    assert all(cost > 0 for by_size in findings.figures["seconds"].values() for cost in by_size.values())
    findings.write(tmp_path / "cost.json", "cost", 1.0)
    drawn = ElementTree.fromstring((tmp_path / "cost.svg").read_text())
    assert len([text for text in drawn.itertext() if "by parameters" in text]) == 3
