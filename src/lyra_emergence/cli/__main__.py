"""`python -m lyra_emergence.cli`, where neither the checkout nor the installed command is at hand."""

import sys

from lyra_emergence.cli import run_program

if __name__ == "__main__":
    sys.exit(run_program())
