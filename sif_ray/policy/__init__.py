"""The vision-language policy: loading, token-exact prompts, and log-probs of completions that share a prompt."""
