"""The command `rlhf-jax preference` from a checkout, installed or not: python scripts/preference.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rlhf_jax.cli.app import console

if __name__ == "__main__":
    console("preference")
