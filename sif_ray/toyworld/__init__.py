"""The embedded default: rendered scenes with exact boxes and depth, a tiny policy and a tiny depth model (toys)."""
