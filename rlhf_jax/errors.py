"""The one exception of a user's mistake."""


class UserError(ValueError):
    """A mistake in the user's input: file, line or field, what was found, what was wanted, what to do.

    Scripts print it as one line.
    """
