"""Fixtures that several parts share. What tests build themselves is in tests/support."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.support.tiny import batch_of, mixed_samples, tiny_model
from vico_pl.data.glyphs import GlyphsConfig, draw_records, question_words
from vico_pl.data.shards.reader import write_index, write_shard
from vico_pl.tokens import build_tokenizer

# No test is a matter of speed, and a failure on one machine must be the same on another.
settings.register_profile("vico", deadline=None, derandomize=True)
settings.load_profile("vico")

SHARD_SIZES = (7, 7, 4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(question_words(), vocab_size=384)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder of three GlyphDocs shards with 18 records in all."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    config = GlyphsConfig(max_tiles=2, questions_per_image=3)
    start = 0
    for number, count in enumerate(SHARD_SIZES):
        write_shard(
            folder / f"train-{number:06d}.tar", draw_records(config, seed=7, start=start, count=count)
        )
        start += count
    write_index(folder)
    return folder


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def batch():
    return batch_of(*mixed_samples())
