"""The embedded default: the recipe on Python's documentation, with simulated labellers."""
