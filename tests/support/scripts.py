"""Import the scripts of benchmarks/, which is not a package."""

import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load_benchmark(name):
    """Import benchmarks/NAME.py with its folder on the path."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))  # before the folder data/
    return import_module(name)
