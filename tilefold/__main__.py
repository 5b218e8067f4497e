"""`python -m tilefold` is the command `tilefold`."""

import sys

from tilefold.cli import main

if __name__ == "__main__":
    sys.exit(main())
