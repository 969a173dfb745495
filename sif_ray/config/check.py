"""What a configuration must hold: each block says it beside its keys, as `CHECKS` and as the method `relations`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from sif_ray.method.profile import ProfileError, resolve


class ConfigError(ValueError):
    """The request is wrong: the message names the field, the value and the way out."""


Check = tuple[str, Callable[[Any], bool], str]
"""A key, what its value must hold, and the way out. A block's class variable `CHECKS` is a list of them."""


def validate(config: Any, prefix: str = "") -> None:
    """Raise `ConfigError` for the first impossible value of `config` or of a block inside it.

    A block's `relations()` yields what does not hold between its keys, each beginning with a key, and the way out.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        for name, block in value.items() if isinstance(value, dict) else [("", value)]:
            if is_dataclass(block):
                validate(block, f"{prefix}{item.name}.{name}{'.' if name else ''}")
    for name, holds, way_out in _checks(type(config)):
        value = getattr(config, name)
        if not holds(value):
            raise ConfigError(f"{prefix}{name} = {value!r}: {way_out}")
    if hasattr(config, "profile"):
        try:
            resolve(config.profile)
        except ProfileError as error:
            raise ConfigError(f"{prefix}profile = {config.profile!r}: {error}") from error
    for complaint in config.relations() if hasattr(config, "relations") else ():
        raise ConfigError(f"{prefix}{complaint}")


def _checks(block: type[Any]) -> Iterator[Check]:
    """The block's own and those of what it extends."""
    for kind in reversed(block.__mro__):
        yield from vars(kind).get("CHECKS", ())
