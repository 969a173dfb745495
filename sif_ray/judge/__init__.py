"""Judges of answers, with typed outcomes."""
