import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vico_pl.stages.labels import RouterConfig, SlidingWindow, loss_ratio, router_targets, soft_targets


def percentile(*, num_coarser=1, **changes):
    config = RouterConfig(**{"percentile": 50.0, "window": 4, "min_history": 1, **changes})
    return SlidingWindow(config, num_coarser=num_coarser)


def column(*values):
    return torch.tensor(values)[:, None]


def test_the_loss_ratio_of_the_worked_examples():
    compressed, full = torch.tensor([0.3, 0.1, 0.0, 0.0]), torch.tensor([0.1, 0.3, 0.4, 0.0])
    expected = torch.tensor([2.0, 0.5, 0.2, 1.0])  # epsilon .1 in numerator and denominator
    torch.testing.assert_close(loss_ratio(compressed, full, epsilon=0.1), expected)


def test_tiles_below_the_threshold_are_to_be_compressed():
    targets = router_targets(column(0.5, 0.999, 1.0, 1.001, 9.0), [1.0])
    assert targets.tolist() == [0, 0, 1, 1, 1]  # at the threshold: keep; 0 and 1 as in published checkpoints


def test_of_several_ratios_the_coarsest_below_its_own_threshold_is_the_target():
    ratios = torch.tensor([[2.9, 1.1], [3.0, 0.9], [3.0, 1.0], [1.0, 9.0]])  # of ratios 64 and 16
    assert router_targets(ratios, [3.0, 1.0]).tolist() == [0, 1, 2, 0]


def test_soft_targets_are_a_sigmoid_of_the_distance_to_the_threshold_in_logarithms():
    soft = soft_targets(column(0.5, 2.0, 8.0), [2.0], softness=0.5)
    expected = torch.sigmoid(torch.tensor([0.25, 1.0, 4.0]).log() / 0.5)  # P(keep)
    torch.testing.assert_close(soft, torch.stack([1 - expected, expected], 1))


@given(
    ratios=st.lists(st.tuples(*[st.floats(0.125, 10, width=32)] * 2), min_size=1, max_size=9),
    softness=st.floats(0.05, 5),
)
def test_soft_targets_are_probabilities_and_become_the_hard_ones(ratios, softness):
    ratios = torch.tensor(ratios)
    assert torch.allclose(soft_targets(ratios, [3.0, 1.0], softness=softness).sum(1), torch.ones(len(ratios)))
    clear = ratios[((ratios / torch.tensor([3.0, 1.0])).log().abs() > 0.01).all(1)]
    found = soft_targets(clear, [3.0, 1.0], softness=1e-4).argmax(1)
    assert torch.equal(found, router_targets(clear, [3.0, 1.0]))


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
        assert ours.thresholds() is None
    else:
        expected = np.percentile(seen[-window:].astype(np.float64), k)
        assert ours.thresholds() == pytest.approx([expected], rel=1e-5, abs=1e-5)


def test_there_is_no_threshold_before_min_history():
    window = percentile(window=8, min_history=3)
    window.update(torch.tensor([1.0, 2.0]))
    assert window.thresholds() is None
    window.update(torch.tensor([3.0]))
    assert window.thresholds() == [2.0]  # the zeros of the empty places do not count


def test_a_checkpoint_keeps_the_window():
    window, restored = percentile(window=5), percentile(window=5)
    window.update(torch.tensor([5.0, 1.0, 4.0]))
    restored.load_state_dict(window.state_dict())
    for state in (window, restored):
        state.update(torch.tensor([9.0]))
    assert restored.thresholds() == window.thresholds() == [4.5]


def test_each_coarser_ratio_has_a_threshold_of_its_own():
    window = percentile(num_coarser=2, window=3)
    window.update(torch.tensor([[9.0, 8.0], [4.0, 1.0], [6.0, 3.0], [5.0, 2.0]]))
    assert (window.thresholds(), int(window.seen)) == ([5.0, 2.0], 4)  # the first tile has fallen out
    assert percentile().values.shape == (4,)  # as in checkpoints from before there were more than two ratios


def test_the_rule_tolerance_needs_no_history():
    window = percentile(label_rule="tolerance", tolerance=0.25, min_history=4, num_coarser=2)
    assert window.thresholds() == [1.25, 1.25]
