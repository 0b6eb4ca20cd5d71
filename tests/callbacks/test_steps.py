from unittest import mock

import lightning as L
import torch

from vico_pl.callbacks.steps import StepSeed


def drawn(*, seed=1, step=2, rank=0):
    trainer = mock.Mock(spec=L.Trainer, global_step=step, global_rank=rank)
    StepSeed(seed).on_train_batch_start(trainer, mock.Mock(spec=L.LightningModule), None, 0)
    return torch.rand(4).tolist()


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone():
    first = drawn()
    torch.rand(100)
    assert drawn() == first
    assert len({tuple(x) for x in (first, drawn(seed=2), drawn(step=3), drawn(rank=1))}) == 4
