"""Evaluation: held-out scenes with controls that take sight away, and the paper's benchmarks from saved outputs."""
