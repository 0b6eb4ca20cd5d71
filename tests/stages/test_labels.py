import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from tests.helpers import batch_of, encoded_sample, mixed_samples, tiny_model
from vico_pl.model.reference import FrozenReference
from vico_pl.stages.labels import mean_per_sample, tile_loss_ratios

EPSILON = 1e-3


@pytest.fixture
def policy():
    return tiny_model(1)


@pytest.fixture
def reference():
    return FrozenReference(tiny_model(2))


@torch.no_grad()
def naive_sample_loss(policy, reference, sample, ratios):
    """Mean divergence of one sample that runs alone, by torch's own KL in float64."""
    batch = batch_of(sample)
    if not sample.response_mask.any():
        return 0.0
    ours = policy.response_states(batch, policy.encode_tiles(batch.tiles), ratios) @ policy.head.T
    full = torch.full_like(ratios, 4)
    wanted = reference.response_states(batch, reference.encode_tiles(batch.tiles), full) @ reference.head.T
    log_q, log_p = (log_softmax(x.double(), -1) for x in (ours, wanted))
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()


def naive_ratios(policy, reference, samples, mode):
    """Loss ratios from one forward pass per tile, each sample and each tile by itself."""
    found = []
    for sample in samples:
        num_tiles = len(sample.tiles)
        full = torch.full((num_tiles,), 4)
        without = naive_sample_loss(policy, reference.model, sample, full)
        for tile in range(num_tiles):
            ratios = torch.full((num_tiles,), 16) if mode == "image" else full.clone()
            ratios[tile] = 16
            loss = naive_sample_loss(policy, reference.model, sample, ratios)
            found.append((loss + EPSILON) / (without + EPSILON))
    return torch.tensor(found, dtype=policy.head.dtype)


def ratios_of(policy, reference, *samples, mode="tile"):
    batch = batch_of(*samples)
    features = policy.encode_tiles(batch.tiles)
    return tile_loss_ratios(policy, reference, batch, features, mode=mode, epsilon=EPSILON)


@pytest.mark.parametrize("mode", ["tile", "image"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_loss_ratios_equal_those_of_every_tile_run_alone(policy, reference, mode, dtype, tolerance):
    policy, reference = policy.to(dtype), reference.to(dtype)
    samples = [*mixed_samples(), encoded_sample(5, images=(2,), answers=())]
    expected = naive_ratios(policy, reference, samples, mode)
    assert expected.std() > 0.01, "the example tells tiles apart"
    found = ratios_of(policy, reference, *samples, mode=mode)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_image_labels_are_alike_for_the_tiles_of_a_sample_and_tile_labels_are_not(policy, reference):
    sample = encoded_sample(1, images=(3,))
    assert len(set(ratios_of(policy, reference, sample, mode="image").tolist())) == 1
    assert len(set(ratios_of(policy, reference, sample).tolist())) == 3


@pytest.mark.parametrize("mode", ["tile", "image"])
def test_a_sample_without_response_has_ratio_one(policy, reference, mode):
    silent = encoded_sample(1, images=(2,), answers=())
    found = ratios_of(policy, reference, silent, encoded_sample(2, images=(1,)), mode=mode)
    assert found[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mode", ["tile", "image"])
def test_text_alone_has_no_ratios(policy, reference, mode):
    assert ratios_of(policy, reference, encoded_sample(1, images=()), mode=mode).shape == (0,)


@pytest.mark.parametrize("mode", ["tile", "image"])
def test_vision_encoder_and_reference_run_once(policy, reference, mode):
    encoded, passes = [], {"policy": 0, "reference": 0}

    def count(name):
        passes[name] += 1

    for name, model in (("policy", policy), ("reference", reference.model)):
        model.vision.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
        model.language.base_model.register_forward_hook(lambda *_, name=name: count(name))
    ratios_of(policy, reference, *mixed_samples(), mode=mode)
    assert encoded == [7, 7]
    assert passes == {"policy": 2, "reference": 1}  # at full tokens, and what is compressed


def test_values_are_averaged_over_each_sample():
    samples = mixed_samples()  # 4, 5, 6 and 2 response tokens
    samples.insert(2, encoded_sample(9, answers=()))
    values = torch.arange(17.0)
    expected = [part.mean().item() if len(part) else 0.0 for part in values.split([4, 5, 0, 6, 2])]
    assert mean_per_sample(values, batch_of(*samples)).tolist() == pytest.approx(expected)
