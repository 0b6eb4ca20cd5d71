"""How much memory reading a checkpoint takes: its weights once, as views of the file."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.released import LANGUAGE_CONFIG, VISION_CONFIG, official_config, write_official
from vico_pl.model.families.folder import export

# Reads a model and every byte of its weights, in a process of its own whose peak nothing else has raised.
READ = """
import re, sys
from pathlib import Path
from vico_pl.model.families.folder import load_model

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

imported = peak()
model = load_model(sys.argv[1], dtype=None)
largest = [tensor.amax() for tensor in model.state_dict().values()]
print(peak() - imported)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder for large files: pytest would keep those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, 24), (torch.bfloat16, 48)], ids=str)
def test_reading_takes_the_memory_of_the_weights_once(folder, dtype, layers):
    language = {"hidden_size": 768, "intermediate_size": 3072, "vocab_size": 32000}
    language = LANGUAGE_CONFIG | language | {"num_hidden_layers": layers}
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    config = official_config(flash=True, llm_config=language, vision_config=VISION_CONFIG | vision)
    write_official(folder / "flash", flash=True, dtype=dtype, config=config)
    export(folder / "flash", folder / "ours", layout="ours")
    for layout in ("flash", "ours"):
        size = (folder / layout / "model.safetensors").stat().st_size
        assert 0.7 * 2**30 < size < 1.5 * 2**30
        command = [sys.executable, "-c", READ, folder / layout]
        reader = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert reader.returncode == 0, reader.stderr
        assert int(reader.stdout) < 1.3 * size, layout
