"""The command line, `rlhf-jax COMMAND …`: each command is a file with its `Config` and a `run` that imports JAX."""
