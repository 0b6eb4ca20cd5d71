"""How much memory reading a checkpoint takes: its weights once, as views of the file."""

import shutil
import subprocess
import sys

import pytest
import torch

from tests.released import LANGUAGE_CONFIG, VISION_CONFIG, official_config, write_official
from vico_pl.model.families.folder import export

GIBIBYTE = 2**30
# Reads a model and every byte of its weights, in a process of its own whose peak nothing else has raised.
READ = """
import re, sys
from pathlib import Path
from vico_pl.model.families.folder import load_model


def memory(kind):
    return int(re.search(kind + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


imported = memory("VmHWM")
model = load_model(sys.argv[1], dtype=None)
largest = [tensor.amax() for tensor in model.state_dict().values()]
print(memory("VmHWM") - imported)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def write_large(folder, dtype):
    """A checkpoint of about a gibibyte."""
    layers = 24 if dtype == torch.float32 else 48
    language = {
        **LANGUAGE_CONFIG,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
    }
    vision = {**VISION_CONFIG, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    config = official_config(flash=True, llm_config=language, vision_config=vision)
    write_official(folder, flash=True, dtype=dtype, config=config)


@pytest.fixture
def folder(tmp_path):
    """A folder for large files: pytest would keep those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def peak_of_reading(folder):
    """Peak memory in bytes, less that of the imports."""
    command = [sys.executable, "-c", READ, folder]
    output = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert output.returncode == 0, output.stderr
    return int(output.stdout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_takes_the_memory_of_the_weights_once(folder, dtype):
    write_large(folder / "flash", dtype)
    export(folder / "flash", folder / "ours", layout="ours")
    for layout in ("flash", "ours"):
        size = (folder / layout / "model.safetensors").stat().st_size
        assert 0.7 * GIBIBYTE < size < 1.5 * GIBIBYTE
        assert peak_of_reading(folder / layout) < 1.3 * size, layout
