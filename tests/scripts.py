"""Loading the scripts of benchmarks/, which are no package."""

import sys
from importlib import import_module
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(name):
    """Import benchmarks/NAME.py as running it would, its neighbours beside it."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))  # before the folder data/
    return import_module(name)
