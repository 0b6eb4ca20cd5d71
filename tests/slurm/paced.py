"""`vico` with steps that take at least $STEP_S seconds, as those of a model worth a cluster do.

A run of tiny steps can then be met in the middle without keeping the machine busy until then.
"""

import os
import time

from vico_pl.callbacks.guards import StepSeed
from vico_pl.cli import main

_seed = StepSeed.on_train_batch_start


def _wait_then_seed(*args):
    time.sleep(float(os.environ.get("STEP_S", "0")))
    _seed(*args)


if __name__ == "__main__":
    StepSeed.on_train_batch_start = _wait_then_seed
    main()
