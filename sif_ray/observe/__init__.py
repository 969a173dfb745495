"""Watching a run: metrics, timeline, progress, the run folder, its summary and its HTML report."""
