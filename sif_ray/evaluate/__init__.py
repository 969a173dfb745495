"""Held-out evaluation: scores of single answers, controls that take sight away, scene-level confidence intervals."""
