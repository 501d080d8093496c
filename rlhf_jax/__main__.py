"""`python -m rlhf_jax COMMAND …`, the same as `rlhf-jax COMMAND …`."""

from rlhf_jax.cli.app import console

console()
