"""Devices and processes: meshes, shardings, and multi-process runs. No other code depends on them."""
