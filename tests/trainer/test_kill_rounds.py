"""kill -9 at random moments, again and again: a run ends with the weights of an uninterrupted one.

`KILL_ROUNDS` and `KILL_ROUNDS_OF_RANKS` in the environment are the numbers of kills.
"""

import os
import random
from collections import Counter

import pytest

from tests.support.runs import audit, differing, finish, kill_at_random, newest_step, steps_taken
from vico_pl.prepare import is_finished

pytestmark = pytest.mark.slow

STEPS = 16
SETTINGS = [f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=1", "trainer.log_every=5"]
KILLS = os.environ.get("KILL_ROUNDS", "20"), os.environ.get("KILL_ROUNDS_OF_RANKS", "5")
ROUNDS = dict(zip((1, 2), map(int, KILLS), strict=True))  # by number of ranks


@pytest.mark.parametrize("ranks", ROUNDS)
def test_kills_at_any_moment_change_no_weight_and_no_sample(runs, tmp_path, record_property, ranks):
    recipe, unbroken, rng = runs / "consistency.yaml", tmp_path / "unbroken", random.Random(ranks)
    finish(recipe, unbroken, *SETTINGS, ranks=ranks)
    number, moments, lost = 0, Counter(), []
    while moments.total() < ROUNDS[ranks]:
        run_dir = tmp_path / f"run-{number}"
        running = kill_at_random(recipe, run_dir, *SETTINGS, rng=rng, ranks=ranks)
        codes = running.wait(supervised=True)
        if set(codes) == {0}:  # it was over before
            check_finished(run_dir, unbroken)
            number += 1
            continue
        saved = newest_step(run_dir)
        lost.append(steps_taken(run_dir) - saved)
        moments[moment(saved, run_dir)] += 1
    run_dir = tmp_path / f"run-{number}"
    finish(recipe, run_dir, *SETTINGS, ranks=ranks)
    check_finished(run_dir, unbroken)
    record_property("fault", f"{ROUNDS[ranks]} times kill -9 at a random moment, {who(ranks)}")
    record_property(
        "outcome",
        f"{number + 1} runs ended with the weights of an uninterrupted one bit for bit, their audits clean; "
        f"killed {', '.join(f'{count} times {name}' for name, count in sorted(moments.items()))}",
    )
    record_property("lost_steps", f"at most {max(lost)}, a checkpoint at each step")


def who(ranks):
    return "one process" if ranks == 1 else f"one or all of {ranks} ranks"


def moment(saved, run_dir):
    if is_finished(run_dir):
        return "after the model was written"
    if any((run_dir / "checkpoints").glob(f".step-{saved + 1:08d}.ckpt.*.partial")):
        return "while saving"
    return "between steps or at the start" if saved else "before the first checkpoint"


def check_finished(run_dir, unbroken):
    assert is_finished(run_dir)
    assert differing(run_dir, unbroken) == set()
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if not path.is_symlink())
    # Two; that which the last attempt went on from; one whose removal a kill after the last step prevented.
    assert len(kept) <= 4, kept
    found = audit(run_dir)
    assert found.num_steps == STEPS
    assert found.faults == []
