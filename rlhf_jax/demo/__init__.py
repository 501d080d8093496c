"""The embedded default: the documentation of Python itself as a corpus, and a written-down gold score."""
