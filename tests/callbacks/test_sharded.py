"""Reading a checkpoint folder; how ranks write one is in tests/trainer/test_ranks.py."""

import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from vico_pl.callbacks.checkpoints import checkpoint_fault
from vico_pl.callbacks.sharded import INDEX, META, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path):
    tensors = {"weight/a": torch.arange(6.0).view(2, 3), "weight/b": torch.ones(2, dtype=torch.bfloat16)}
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    torch.save({"global_step": 3, "files": sizes}, tmp_path / META)
    return tmp_path


def test_a_folder_reads_as_the_file_of_one_process(folder):
    assert checkpoint_fault(folder) is None
    checkpoint = read_checkpoint(folder)
    assert checkpoint["global_step"] == 3
    assert checkpoint["state_dict"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint["state_dict"]["b"].dtype == torch.bfloat16


def calling(module, name):
    """A pickle that calls a function with the command to make a file."""
    words = [pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode() for word in (module, name)]
    argument = pickle.SHORT_BINUNICODE + bytes([14]) + b"touch executed"
    call = b"".join([*words, pickle.STACK_GLOBAL, argument, pickle.TUPLE1, pickle.REDUCE])
    return pickle.PROTO + b"\x04" + call + pickle.STOP


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("torch.distributed.checkpoint.metadata", "os.system")]
)
@pytest.mark.parametrize("size_is_known", [True, False])
def test_an_index_that_would_run_a_command_is_a_fault(folder, monkeypatch, size_is_known, module, name):
    monkeypatch.chdir(folder.parent)
    content = calling(module, name)
    (folder / INDEX).write_bytes(content)
    if size_is_known:
        meta = torch.load(folder / META)
        torch.save({**meta, "files": {**meta["files"], INDEX: len(content)}}, folder / META)
    assert (".metadata names" if size_is_known else "bytes, expected") in checkpoint_fault(folder)
    assert not os.path.exists("executed")
