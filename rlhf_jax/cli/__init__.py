"""Command line `rlhf-jax COMMAND …`: one module per command, with its `Config` and a `run` that imports JAX."""
