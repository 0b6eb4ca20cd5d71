from functools import partial

import pytest
import torch

from tests.support.tiny import TILE, batch_of, encoded_sample, intern_vit, tiny_model, tiny_spec
from vico_pl.model.blocks import checkpoint_blocks, compile_blocks, find_blocks
from vico_pl.model.vision import VisionEncoder

TIMM = {"image_size": TILE, "timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}
TIMM_STAGES = {"image_size": TILE, "timm_model_name": "convnext_atto", "timm_pool": ""}
INTERNVL = intern_vit(num_hidden_layers=3)
PLAIN = {**tiny_spec().vision, "layers": 3}


# torch 2.15 looks at .grad of every tensor while it compiles, and silences the warning unless it is an error.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def gradients(model, batch):
    """Gradients of every parameter that takes part, by name."""
    model.zero_grad()
    features = model.encode_tiles(batch.tiles)
    model.response_states(batch, features, model.full_ratios(batch)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def first_layers(model):
    """A module inside the first block of the vision tower and one of the language model."""
    return model.vision.tower.transformer.resblocks[0].mlp, model.language.model.layers[0].mlp


@pytest.mark.parametrize(
    ("config", "count"), [(PLAIN, 3), (TIMM, 12), (TIMM_STAGES, 4), (INTERNVL, 3)], ids=str
)
def test_the_blocks_of_every_kind_of_vision_tower_are_found(config, count):
    blocks = find_blocks(VisionEncoder(config).tower)
    assert len(blocks) == count
    assert len({type(block) for block in blocks}) == 1


@pytest.mark.parametrize("vision", [PLAIN, TIMM, INTERNVL], ids=str)
def test_recomputing_blocks_changes_no_gradient(vision, batch):
    plain, model = (tiny_model(vision=vision, ratios=[4]).train() for _ in range(2))
    checkpoint_blocks(model.vision)
    checkpoint_blocks(model.language)
    expected, found = gradients(plain, batch), gradients(model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


def test_blocks_run_once_more_when_their_gradients_are_due(model, batch):
    vision_calls, language_calls = (count_calls(layer) for layer in first_layers(model.train()))
    gradients(model, batch)
    assert (len(vision_calls), len(language_calls)) == (1, 1)
    checkpoint_blocks(model.vision)
    checkpoint_blocks(model.language)
    gradients(model, batch)
    assert (len(vision_calls), len(language_calls)) == (3, 3)


def test_nothing_is_recomputed_where_no_gradient_is_due(model, batch):
    checkpoint_blocks(model.vision)
    checkpoint_blocks(model.language)
    model.vision.requires_grad_(requires_grad=False)
    model.language.get_input_embeddings().requires_grad_(requires_grad=False)
    vision_calls, language_calls = (count_calls(layer) for layer in first_layers(model))
    assert gradients(model.train(), batch)
    assert (len(vision_calls), len(language_calls)) == (1, 2)


def check_compiled(batches):
    """Compile a model, recomputing too; return how many programs it took after each batch."""
    plain, model = tiny_model().train(), tiny_model().train()
    for part in (model.vision, model.language):
        compile_blocks(part)
        checkpoint_blocks(part)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for batch in batches:
        expected, found = gradients(plain, batch), gradients(model, batch)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
        yield


def batches_of_all_sizes():
    for seed, images in enumerate([(1,), (3,), (), (1, 2), (5,)]):
        yield batch_of(*[encoded_sample(10 * seed + i, images=images) for i in range(seed + 1)])


@compiles
def test_a_few_compiled_programs_serve_blocks_and_batches_of_all_sizes(monkeypatch):
    programs = []

    def count(graph, _):
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    counts = [len(programs) for _ in check_compiled(batches_of_all_sizes())]
    assert counts[0] > 0
    assert counts[1:] == counts[1:2] * 4  # one tile is a case of its own; after it there is nothing new


@compiles
@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    assert len(list(check_compiled(batches_of_all_sizes()))) == 5
