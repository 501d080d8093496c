"""The exception raised for mistakes in the user's input, and the command that installs optional packages."""

import importlib.metadata
import shlex


class UserError(ValueError):
    """A mistake in the user's input.

    The message names the file and line or the field, the expected and the actual value, and what to do. Commands print
    it as one line and exit.
    """


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra of pyproject.toml.

    It names the packages and not `rlhf_jax[extra]`, as the library itself may not be on the user's package index.
    """
    try:
        every = importlib.metadata.requires("rlhf_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return f"pip install '.[{extra}]' in the checkout"
    parts = [requirement.partition(";") for requirement in every]
    return shlex.join(["pip", "install", *(name.strip() for name, _, mark in parts if f"extra == '{extra}'" in mark)])
