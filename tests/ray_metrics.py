"""What stands at the metrics endpoint of the Ray node that the tests run on."""

from __future__ import annotations

import re
import urllib.request


def scrape() -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every series."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as reply:
        text = reply.read().decode()
    lines = re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)) for name, labels, value in lines]
