import shutil
import tempfile

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.callbacks.steps import StageLog, TrainerAt
from vico_pl.callbacks.checkpoints import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
from vico_pl.callbacks.sharded import ShardedStrategy


@pytest.mark.parametrize("writer", [AtomicCheckpointIO(), ShardedStrategy()])
def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch, writer):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2**20))
    state = {
        "state_dict": {"a": torch.zeros(2**19)},
        "optimizer_states": [{"state": {"a": {"b": torch.zeros(3)}}, "param_groups": []}],
    }
    expected = r"1 MiB are free and a checkpoint needs 3; make room, or lower trainer\.keep_checkpoints"
    with pytest.raises(ValueError, match=expected):
        writer.save_checkpoint(state, tmp_path / "step.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_written_once_and_not_put_together_in_memory(tmp_path, monkeypatch):
    path, written, save = tmp_path / "step.ckpt", [], torch.save
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: pytest.fail("another folder has room, too?"))
    monkeypatch.setattr(torch, "save", lambda state, target: written.append(target) or save(state, target))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    assert [target.parent for target in written] == [tmp_path]
    assert AtomicCheckpointIO().load_checkpoint(path, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def save(run_dir, step, **state):
    path = run_dir / "checkpoints" / f"step-{step:08d}.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": step, "weight": torch.ones(1000), **state}, path)
    return path


def test_the_newest_checkpoint_is_that_with_the_most_steps(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 10)
    newest = save(tmp_path, 200)
    save(tmp_path, 30)
    assert newest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\0" * len(content),
        lambda content: b"text, not a checkpoint",
    ],
)
def test_damaged_checkpoints_are_passed_over_and_named(tmp_path, damage):
    whole, newest = save(tmp_path, 10), save(tmp_path, 20)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=f"{newest} is skipped: it cannot be read"):
        assert newest_checkpoint(tmp_path) == whole


def test_a_file_that_is_no_training_state_is_passed_over(tmp_path):
    path = tmp_path / "checkpoints" / "step-00000009.ckpt"
    path.parent.mkdir()
    torch.save([1, 2], path)
    with pytest.warns(UserWarning, match="it has no training state"):
        assert newest_checkpoint(tmp_path) is None


def begin(folder, *, at, known=()):
    """Begin to train at a step, with a checkpoint's account of what is kept."""
    callback = StepCheckpoint(folder, every=2, keep=2)
    callback.best_k_models = {str(folder / name): torch.tensor(0) for name in known}
    strategy = SingleDeviceStrategy(checkpoint_io=AtomicCheckpointIO())
    callback.on_train_start(TrainerAt(at, strategy=strategy), StageLog())
    return {path.name for path in folder.iterdir()}


def test_what_killed_attempts_left_over_is_removed_and_nothing_else(tmp_path):
    folder = save(tmp_path, 2).parent
    assert begin(folder, at=0) == {"step-00000002.ckpt"}  # a run that starts over removes none
    for step in (4, 6, 8):
        save(tmp_path, step)
    for name in ("step-00000008.ckpt.partial", ".step-00000008.ckpt.12-34.partial"):
        (folder / name).write_bytes(b"of a killed process")
    (folder / "notes.txt").write_text("of a user")
    known = ["step-00000004.ckpt", "step-00000006.ckpt"]
    kept = {*known, "step-00000008.ckpt", "notes.txt"}  # step 8 comes again and replaces its checkpoint
    assert begin(folder, at=6, known=known) == kept


def test_the_account_of_what_is_kept_outlives_other_settings(tmp_path):
    one, other = (StepCheckpoint(tmp_path, every=every, keep=keep) for every, keep in ((2, 2), (100, 3)))
    assert one.state_key == other.state_key


def test_a_file_replaces_a_damaged_folder_of_its_name(tmp_path):
    path = tmp_path / "checkpoints" / "step-00000010.ckpt"
    path.mkdir(parents=True)
    (path / "meta.pt").write_bytes(b"damaged")
    assert save(tmp_path, 10) == path == newest_checkpoint(tmp_path)
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_a_killed_process_was_replacing_comes_back(tmp_path):
    """Unless the new one is already there."""
    for name in (".best.ckpt.replaced", ".step-00000010.ckpt.replaced", "step-00000010.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    assert begin(tmp_path, at=0) == {"best.ckpt", "step-00000010.ckpt"}
    assert (tmp_path / "best.ckpt" / "from").read_text() == ".best.ckpt.replaced"
    assert (tmp_path / "step-00000010.ckpt" / "from").read_text() == "step-00000010.ckpt"


def test_a_folder_is_removed_as_a_whole(tmp_path, monkeypatch):
    folder = tmp_path / "step-00000010.ckpt"
    folder.mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path: pytest.fail(path.name))
    with pytest.raises(pytest.fail.Exception, match=r"\.step-00000010\.ckpt\.removed\.partial"):
        AtomicCheckpointIO().remove_checkpoint(folder)
    monkeypatch.undo()
    assert begin(tmp_path, at=0) == set()  # killed in between, the next start removes the rest
