"""Runs a notebook in a fresh kernel of this Python, where a warning is an error, and writes it with its outputs.

python -m tests.run_notebook NOTEBOOK OUTPUT
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

# Importing it makes Matplotlib's cache of fonts where there is none yet, which a kernel would say in the notebook.
import matplotlib.font_manager  # noqa: F401
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient


def run(path: Path) -> Any:
    """The notebook with the outputs of this run."""
    notebook: Any = nbformat.read(path, as_version=4)
    strict = nbformat.v4.new_code_cell("import warnings\nwarnings.simplefilter('error')")
    notebook.cells.insert(0, strict)
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in a file: no port, no network. Their path must be short, so not below pytest's own folder.
        manager = AsyncKernelManager(
            kernel_name="python3", transport="ipc", connection_file=f"{folder}/kernel.json", ip=f"{folder}/kernel"
        )
        place = {"metadata": {"path": str(path.parents[1])}}
        client = NotebookClient(notebook, km=manager, timeout=300, resources=place, store_widget_state=False)
        flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
        client.execute(cleanup_kc=True, env={**os.environ, "XLA_FLAGS": flags, "JUPYTER_PREFER_ENV_PATH": "1"})
    del notebook.cells[0]
    return notebook


if __name__ == "__main__":
    warnings.simplefilter("error")
    nbformat.write(run(Path(sys.argv[1])), Path(sys.argv[2]))
