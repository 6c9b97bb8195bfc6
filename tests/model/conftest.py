"""Small matrices on a busy machine: one thread, set before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
