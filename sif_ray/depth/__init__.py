"""Monocular depth of photographs: Depth Anything through transformers, in batches."""
