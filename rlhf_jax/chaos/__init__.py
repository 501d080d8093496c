"""Fault injection: the guarantees of docs/explanation/machine-dies.md, tried on this machine."""
