"""A stage's configuration from a YAML file with exactly the keys of its dataclass, and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sif_ray.config.check import ConfigError, validate
from sif_ray.config.stages import STAGES, StageConfig

MAX_VALUES = 100_000  # of a file

# What parsers and OmegaConf raise for text from outside. Many are of Python's own types: a date in month 13, a number
# of 5,000 digits, a list 5,000 deep, a list where keys should be.
_UNREADABLE = (
    *(OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError),
    *(AttributeError, AssertionError, LookupError, OverflowError),
)


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
            yield OmegaConf.create(_bounded(_read(path), path))
        yield OmegaConf.from_dotlist(list(overrides))

    return _merged(block, parts, where)


def load_values(stage: str, values: Mapping[str, Any]) -> Any:
    """As `load`, from values that have been read already, such as the `args` of a Ray Serve configuration."""
    return _merged(STAGES[stage], lambda: iter([OmegaConf.create(dict(values))]), "the given values")


def _merged(block: type[Any], parts: Callable[[], Iterator[Any]], where: str) -> Any:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(block), *parts()))
        validate(config)
    except ConfigError:
        raise
    except _UNREADABLE as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        key = getattr(error, "full_key", None) or ""
        raise ConfigError(f"{where}: {what if key in what else f'{key}: {what}'}") from error
    return config


def _bounded(text: str, path: str) -> str:
    """The text, unless its aliases multiply to more values than anybody writes. Raises `ConfigError`."""
    sizes: dict[int, int] = {}  # by node: values in it, aliases written out

    def size(node: Any) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = MAX_VALUES  # what an alias to a node within itself comes to
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in inner for part in pair] if isinstance(node, yaml.MappingNode) else inner
            sizes[id(node)] = 1 + sum(map(size, parts))
        return sizes[id(node)]

    if size(yaml.compose(text, yaml.SafeLoader)) >= MAX_VALUES:
        raise ConfigError(f"{path}: more than {MAX_VALUES} values when its aliases (*name) are written out; use fewer")
    return text


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
