"""The arms of an evaluation: how each item is shown and sampled."""

from __future__ import annotations

from dataclasses import dataclass

from sif_ray.config import EvaluateConfig, SamplingConfig
from sif_ray.evaluate.controls import Control


@dataclass(frozen=True)
class Arm:
    """Example: `Arm("sampled_T0.5", control="none", temperature=0.5, draws=4)`."""

    name: str
    control: Control
    temperature: float  # 0 = greedy
    draws: int  # completions per item

    def sampling(self, max_tokens: int) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature, max_tokens=max_tokens)


def arms(config: EvaluateConfig) -> list[Arm]:
    """Greedy, its controls, then one sampled arm per temperature. Without a depth image there is none to swap."""
    controls: list[tuple[str, Control]] = [("greedy", "none"), ("greedy_blind", "blind")]
    if config.prompt.depth_image:
        controls.append(("greedy_swapped_depth", "swapped_depth"))
    greedy = [Arm(name, control, temperature=0.0, draws=1) for name, control in controls]
    sampled = [Arm(f"sampled_T{float(t)}", "none", temperature=t, draws=config.draws) for t in config.temperatures]
    return [*greedy, *sampled]
