"""The exception raised for mistakes in the user's input."""


class UserError(ValueError):
    """A mistake in the user's input.

    The message names the file and line or the field, the expected and the actual value, and what to do. Commands print
    it as one line and exit.
    """
