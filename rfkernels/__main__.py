"""`python -m rfkernels` is the command `rfkernels`."""

import sys

from rfkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
