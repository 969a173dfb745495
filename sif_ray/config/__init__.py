"""Typed, validated configuration of every stage.

Unknown keys, wrong types and impossible values are refused here, before anything expensive starts. Nothing of it
imports torch, Ray or vLLM.
"""

from sif_ray.config.blocks import (
    EndpointConfig,
    EngineConfig,
    JudgeConfig,
    LearnerConfig,
    LoraConfig,
    ObjectiveConfig,
    PlacementConfig,
    PromptConfig,
    RayConfig,
    RewardConfig,
    SamplingConfig,
    TeacherConfig,
)
from sif_ray.config.check import Check, ConfigError, validate
from sif_ray.config.reader import describe, differences, load, load_block, load_values, to_yaml
from sif_ray.config.stages import (
    SOURCES,
    STAGES,
    TRACKERS,
    BenchmarkConfig,
    DepthConfig,
    EvaluateConfig,
    GenerateConfig,
    GrpoConfig,
    QuickstartConfig,
    SelectConfig,
    ServeConfig,
    StageConfig,
    WarmupConfig,
)

__all__ = [
    "SOURCES",
    "STAGES",
    "TRACKERS",
    "BenchmarkConfig",
    "Check",
    "ConfigError",
    "DepthConfig",
    "EndpointConfig",
    "EngineConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GrpoConfig",
    "JudgeConfig",
    "LearnerConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "PlacementConfig",
    "PromptConfig",
    "QuickstartConfig",
    "RayConfig",
    "RewardConfig",
    "SamplingConfig",
    "SelectConfig",
    "ServeConfig",
    "StageConfig",
    "TeacherConfig",
    "WarmupConfig",
    "describe",
    "differences",
    "load",
    "load_block",
    "load_values",
    "to_yaml",
    "validate",
]
