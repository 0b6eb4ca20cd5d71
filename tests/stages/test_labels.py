import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.stages.router import COMPRESS, KEEP, RouterConfig, SlidingPercentile, loss_ratio, router_targets


def percentile(**changes):
    return SlidingPercentile(RouterConfig(**{"percentile": 50.0, "window": 4, "min_history": 1, **changes}))


def test_the_loss_ratio_of_the_worked_examples():
    compressed, full = torch.tensor([0.3, 0.1, 0.0, 0.0]), torch.tensor([0.1, 0.3, 0.4, 0.0])
    expected = torch.tensor([2.0, 0.5, 0.2, 1.0])  # epsilon .1 in numerator and denominator
    torch.testing.assert_close(loss_ratio(compressed, full, epsilon=0.1), expected)


def test_tiles_below_the_threshold_are_to_be_compressed():
    targets = router_targets(torch.tensor([0.5, 0.999, 1.0, 1.001, 9.0]), 1.0)
    assert targets.tolist() == [0, 0, 1, 1, 1]  # at the threshold: keep
    assert (COMPRESS, KEEP) == (0, 1)  # as in published checkpoints


@given(
    batches=st.lists(
        st.lists(st.floats(0, 100, width=32), max_size=9).map(lambda xs: np.array(xs, dtype=np.float32)),
        max_size=6,
    ),
    window=st.integers(1, 12),
    k=st.floats(1, 99),
)
def test_the_threshold_is_numpys_percentile_of_the_last_values(batches, window, k):
    ours = percentile(percentile=k, window=window)
    for values in batches:
        ours.update(torch.from_numpy(values).requires_grad_())
    assert not ours.values.requires_grad
    seen = np.concatenate([np.empty(0, np.float32), *batches])
    if len(seen) == 0:
        assert ours.threshold() is None
    else:
        expected = np.percentile(seen[-window:].astype(np.float64), k)
        assert ours.threshold() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_there_is_no_threshold_before_min_history():
    window = percentile(window=8, min_history=3)
    window.update(torch.tensor([1.0, 2.0]))
    assert window.threshold() is None
    window.update(torch.tensor([3.0]))
    assert window.threshold() == 2.0  # the zeros of the empty places do not count


def test_a_checkpoint_keeps_the_window():
    window, restored = percentile(window=5), percentile(window=5)
    window.update(torch.tensor([5.0, 1.0, 4.0]))
    restored.load_state_dict(window.state_dict())
    for state in (window, restored):
        state.update(torch.tensor([9.0]))
    assert restored.threshold() == window.threshold() == 4.5
