"""Claims about RLHF as experiments in small worlds, each run by one command: `rlhf-jax experiment NAME`."""
