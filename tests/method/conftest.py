"""Property tests of the method are judged by their results: on a busy machine any single example may be slow."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("method", deadline=None)
settings.load_profile("method")
