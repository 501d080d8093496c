"""Devices and processes: meshes, shardings, several processes as one run. The only code that knows them."""
