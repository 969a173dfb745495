"""What can go wrong with an engine, by what the caller should do about it."""

from __future__ import annotations


class RolloutRequestError(ValueError):
    """This engine cannot answer the request; the message names the field and the way out. The engine is fine."""


class WeightSyncError(RuntimeError):
    """A weight update was refused; the message names the tensor. The engine keeps its weights and generates on."""


class EngineDiedError(RuntimeError):
    """The engine is gone, or was ended because its weights could not be trusted. Replace it."""
