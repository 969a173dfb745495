"""The asynchronous GRPO loop: ledger, rewards, and who waits for whom."""
