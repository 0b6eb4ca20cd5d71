"""recipes/slurm/train.sbatch on two nodes: preempted, out of time, killed and cancelled."""

import os
import signal
import time

import pytest

from tests.support.runs import audit, differing, finish, newest_step, recipe, steps_taken
from vico_pl.prepare import is_finished

pytestmark = pytest.mark.slurm

STEPS = ["trainer.checkpoint_every=10", "trainer.log_every=10"]


def assert_as_unbroken(job, recipe_path, tmp_path, *settings):
    """The job's model is, bit for bit, that of an uninterrupted run of two ranks; its audit is clean."""
    assert is_finished(job.run_dir), job.said()
    finish(recipe_path, tmp_path / "unbroken", *settings, ranks=2)
    assert differing(job.run_dir, tmp_path / "unbroken") == set()
    assert audit(job.run_dir).faults == []


def test_a_preempted_job_goes_on_by_itself_and_the_router_follows(
    submit, cluster, consistency, shards, base, tmp_path, record_property
):
    settings = [*STEPS, "trainer.max_steps=60"]
    job = submit(consistency, tmp_path / "stage1", *settings, options=["--partition=low"])
    job.wait_for_checkpoint(step=20)
    cluster.run("sbatch", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
    job.wait_for(lambda: job.restarts == 1 and not job.is_alive())
    saved, taken = newest_step(job.run_dir), steps_taken(job.run_dir)
    assert job.wait() == "COMPLETED", job.said()
    assert job.restarts == 1
    assert_as_unbroken(job, consistency, tmp_path, *settings)

    model = {"path": str(job.run_dir / "model"), "reference": str(base), "router_heads": 4}
    router = recipe(tmp_path, "router", shards, model=model, router={"window": 20, "min_history": 8})
    second = submit(router, tmp_path / "stage2", "trainer.max_steps=4", step_s=0)
    assert second.wait() == "COMPLETED", second.said()
    assert is_finished(second.run_dir)

    record_property("fault", "Slurm, two nodes: preempted by a job of a higher partition")
    record_property("outcome", "requeued by Slurm, finished with the weights of an uninterrupted run")
    record_property("lost_steps", taken - saved)
    assert taken == saved, "the step was finished and saved"


def test_a_job_out_of_time_saves_and_queues_itself_again(submit, consistency, tmp_path, record_property):
    settings = [*STEPS, "trainer.max_steps=150"]
    options = ["--time=1", "--signal=USR1@5"]  # Slurm looks every 30 s and may signal 30 s early
    job = submit(consistency, tmp_path / "stage1", *settings, options=options, step_s=0.4)
    job.wait_for(lambda: job.restarts == 1 and not job.is_alive())
    saved, taken = newest_step(job.run_dir), steps_taken(job.run_dir)
    assert taken == saved > 0
    assert job.wait() == "COMPLETED", job.said()
    assert f"Requeueing job {job.number}." in job.said()
    assert_as_unbroken(job, consistency, tmp_path, *settings)
    record_property("fault", "Slurm, two nodes: SIGUSR1 before the time limit")
    record_property("outcome", "saved, requeued itself, finished with the weights of an uninterrupted run")
    record_property("lost_steps", taken - saved)


def test_a_job_that_loses_a_task_fails_at_once_and_is_finished_by_the_next(
    submit, consistency, tmp_path, record_property
):
    settings = [*STEPS, "trainer.max_steps=40"]
    job = submit(consistency, tmp_path / "stage1", *settings)
    job.wait_for_checkpoint(step=10)
    begun = time.monotonic()
    for number in job.processes(task=1):
        os.kill(number, signal.SIGKILL)
    assert job.wait() == "FAILED", job.said()
    waited, saved, taken = time.monotonic() - begun, newest_step(job.run_dir), steps_taken(job.run_dir)
    assert waited < 60
    assert "Killed" in job.said()
    assert job.restarts == 0
    again = submit(consistency, job.run_dir, *settings, step_s=0)
    assert again.wait() == "COMPLETED", again.said()
    assert_as_unbroken(again, consistency, tmp_path, *settings)
    record_property("fault", "Slurm, two nodes: kill -9 of one task")
    record_property("outcome", f"the job failed within {waited:.1f} s; submitted again, it finished the same")
    record_property("lost_steps", taken - saved)


def test_a_cancelled_job_is_saved_and_stays_cancelled(
    submit, cluster, consistency, tmp_path, record_property
):
    job = submit(consistency, tmp_path / "stage1", *STEPS, "trainer.max_steps=400")
    job.wait_for_checkpoint(step=10)
    cluster.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    job.wait_for(lambda: not job.is_alive())
    saved, taken = newest_step(job.run_dir), steps_taken(job.run_dir)
    assert job.restarts == 0
    assert taken == saved, job.said()
    record_property("fault", "Slurm, two nodes: scancel")
    record_property("outcome", "saved at the end of the step, not requeued")
    record_property("lost_steps", taken - saved)
