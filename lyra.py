"""Start Lyra from a checkout: `uv run lyra.py`."""

import sys

from lyra_emergence.cli import main

if __name__ == "__main__":
    sys.exit(main())
