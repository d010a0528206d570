"""`python -m flashtalk_rt` is the `flashtalk` command."""

import sys

from .cli import entry

if __name__ == "__main__":
    sys.exit(entry())
