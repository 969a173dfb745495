"""The policy update: advantages, the GRPO objective, DeepSpeed ranks and the supervised warm-up."""
