"""Annotated photographs to SIF datasets: sources, depth, frames, teacher, checks, the dataset folder."""
