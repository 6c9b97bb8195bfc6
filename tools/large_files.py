#!/usr/bin/env python
"""Refuse files that belong into DVC, not into git.

python tools/large_files.py FILE ...
"""

import sys
from pathlib import Path

LIMIT = 500_000  # bytes

if __name__ == "__main__":
    large = [(f, n) for f in sys.argv[1:] if Path(f).is_file() and (n := Path(f).stat().st_size) > LIMIT]
    for name, size in large:
        print(f"{name}: {size:,} bytes, over {LIMIT:,}: track it with `dvc add`, or make it smaller")
    sys.exit(bool(large))
