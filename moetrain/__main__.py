"""``python -m moetrain``."""

import sys

from moetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
