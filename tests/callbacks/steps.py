"""A trainer at a step and what callbacks get from it."""

from dataclasses import replace

import lightning as L

from tests.support.tiny import encoded_sample
from vico_pl.data.collate import collate
from vico_pl.types import RankBatch


class TrainerAt(L.Trainer):
    """A trainer that only knows where it is."""

    global_step = global_rank = 0
    world_size, strategy, should_stop = 1, None, False

    def __init__(self, step, *, rank=0, strategy=None):
        self.global_step, self.global_rank, self.strategy = step, rank, strategy


class StageLog(L.LightningModule):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def log(self, name, value, **_):
        self.logged.append((name, value))


def rank_batch(*, bad=()):
    batch = replace(collate([encoded_sample(1)]), ids=["a.tar/1"])
    return RankBatch(micro_batches=[batch], bad_records=list(bad), dummy=batch)
