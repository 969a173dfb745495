"""A stage's configuration from a YAML file with exactly the keys of its dataclass, and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sif_ray.config.check import ConfigError, validate
from sif_ray.config.stages import STAGES, StageConfig


def load(stage: str, path: str | None = None, overrides: Sequence[str] = ()) -> Any:
    """The validated configuration of `stage` from a YAML file (None = defaults) and `key=value` overrides.

    Raises `ConfigError` for a missing or broken file, an unknown key, a wrong type or an impossible value.
    """
    return load_block(STAGES[stage], path, overrides)


def load_block(block: type[Any], path: str | None = None, overrides: Sequence[str] = ()) -> Any:
    """As `load`, for the dataclass of a stage or of a block such as `JudgeConfig`."""
    where = f"{path or 'the defaults'}" + (f" with {' '.join(overrides)}" if overrides else "")

    def parts() -> Iterator[Any]:
        if path is not None:
            yield OmegaConf.create(_read(path))
        yield OmegaConf.from_dotlist(list(overrides))

    return _merged(block, parts, where)


def load_values(stage: str, values: Mapping[str, Any]) -> Any:
    """As `load`, from values that have been read already, such as the `args` of a Ray Serve configuration."""
    return _merged(STAGES[stage], lambda: iter([OmegaConf.create(dict(values))]), "the given values")


def _merged(block: type[Any], parts: Callable[[], Iterator[Any]], where: str) -> Any:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(block), *parts()))
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError) as error:
        what, key = str(error).splitlines()[0], getattr(error, "full_key", None) or ""
        raise ConfigError(f"{where}: {what if key in what else f'{key}: {what}'}") from error
    validate(config)
    return config


def _read(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config {path}: no such file; the ones that ship are in configs/")
    return file.read_text(encoding="utf-8")


def to_yaml(config: StageConfig) -> str:
    """The configuration as YAML that `load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(config: StageConfig) -> dict[str, tuple[Any, Any]]:
    """Every key whose value differs from the default, as {key: (value, default)}."""
    return _differences("", config, type(config)())


def _differences(prefix: str, value: Any, default: Any) -> dict[str, tuple[Any, Any]]:
    if not is_dataclass(value):
        return {} if value == default else {prefix: (value, default)}
    found: dict[str, tuple[Any, Any]] = {}
    for item in fields(value):
        key = f"{prefix}.{item.name}" if prefix else item.name
        found |= _differences(key, getattr(value, item.name), getattr(default, item.name))
    return found


def describe(config: StageConfig) -> str:
    """What a dry run prints: every value that differs from the default."""
    rows = [f"  {key} = {value!r}  (default {default!r})" for key, (value, default) in differences(config).items()]
    return "\n".join([f"{type(config).__name__}: {len(rows)} values differ from the defaults", *rows])
