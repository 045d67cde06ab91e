"""Start Lyra from a checkout: `uv run lyra.py`."""

import sys

from lyra_emergence.cli import run_program

if __name__ == "__main__":
    sys.exit(run_program())
