"""GPUs that a run may be planned on: what their vendor's data sheets say."""

from __future__ import annotations

from dataclasses import dataclass

from sif_ray.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """Peak figures of one GPU in the vendor's usual server of 8.

    Example: `GPUS["h100"].tflops == 989.0`.
    """

    tflops: float  # dense bfloat16, 10^12 operations per second
    memory_gbs: float  # 10^9 bytes per second of its own memory
    memory_gib: float
    link_gbs: float  # to its neighbours, 10^9 bytes per second in one direction
    network_gbs: float  # its share of the server's network, 10^9 bytes per second in one direction
    usd_per_hour: float  # an example of what one is rented for; prices differ and change


GPUS = {
    "a100": Gpu(312.0, 2039.0, 80.0, 300.0, 25.0, 2.0),
    "h100": Gpu(989.0, 3350.0, 80.0, 450.0, 50.0, 3.0),
    "h200": Gpu(989.0, 4800.0, 140.0, 450.0, 50.0, 4.0),
    "b200": Gpu(2250.0, 7700.0, 180.0, 900.0, 50.0, 6.0),
    "l40s": Gpu(362.0, 864.0, 48.0, 32.0, 12.5, 1.2),
}
"""From NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, L40S (PCIe 4.0) and of the servers DGX A100, DGX
H100, DGX H200 and DGX B200. NVLink and PCIe are given there for both directions together, half of it stands here;
networks are 200 Gb/s (A100) or 400 Gb/s a GPU, of an L40S 100 Gb/s (assumed)."""


def find_gpu(name: str) -> Gpu:
    """Raises `ConfigError` for a GPU that is not in `GPUS`."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; use one of {', '.join(GPUS)}")
    return GPUS[name]
