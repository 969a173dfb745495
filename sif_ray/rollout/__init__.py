"""Rollouts: vLLM engines, their weight updates with receipts, and the Ray actor around them."""
