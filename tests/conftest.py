"""One thread per process: ranks on the cores of a small machine must not fight for them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
