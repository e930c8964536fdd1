"""Entry point for torchrun: ``torchrun --nproc-per-node 4 -m moetrain.launch.train [overrides]``."""

import sys

from moetrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
