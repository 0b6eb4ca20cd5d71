"""Pooling, FastV and serving costs against other ways to compute them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from tests.support.folders import fixed_tokenizer, full_ratios, tiled, write_model_folder
from tests.support.tiny import WIDTH, tiny_model, tiny_spec
from vico_pl.data.collate import collate
from vico_pl.evaluation.baselines import fastv_answers, with_pooling
from vico_pl.evaluation.evaluate import serving_cost
from vico_pl.inference.predictor import Predictor

SMALL = tiny_spec().language
LAYERS = 4


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "llama", "qwen3_moe"])
def endless(request, tmp_path_factory):
    """A model of four layers whose answers never end."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    changes = {"model_type": request.param, "num_hidden_layers": LAYERS, "vocab_size": len(fixed_tokenizer())}
    language = {**SMALL, **changes, **(experts if request.param == "qwen3_moe" else {})}
    folder = tmp_path_factory.mktemp("fastv") / "model"
    return Predictor.load(write_model_folder(folder, ends=False, language=language))


# --- Pooling ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """A model with 4 x 4 vision tokens per tile at ratio 4, 2 x 2 at ratio 16 and one at 64."""
    vision = {**tiny_spec().vision, "image_size": 64}
    return tiny_model(vision=vision, ratios=[4, 16, 64])


def means_of_squares(tokens, side):
    """The 4 x 4 tokens of a tile as `side` x `side` means, row by row, by hand."""
    step = 4 // side
    corners = [4 * row + column for row in range(0, 4, step) for column in range(0, 4, step)]
    squares = [[corner + 4 * i + j for i in range(step) for j in range(step)] for corner in corners]
    return torch.stack([tokens[square].mean(0) for square in squares])


@torch.no_grad()
def test_a_pooling_model_averages_full_tokens_over_squares_where_tiles_are_compressed(wide):
    pooled, features, ratios = with_pooling(wide), torch.randn(3, 64, WIDTH), torch.tensor([16, 4, 64])
    before, full = wide.connectors(features, ratios)[0], wide.connectors.by_ratio["4"](features)
    tokens, counts = pooled.connectors(features, ratios)
    assert counts.tolist() == [4, 16, 1]
    expected = [means_of_squares(of_tile, side) for of_tile, side in zip(full, (2, 4, 1), strict=True)]
    torch.testing.assert_close(tokens, torch.cat(expected))
    assert torch.equal(tokens[4:20], before[4:20])
    assert torch.equal(wide.connectors(features, ratios)[0], before), "the model itself is as it was"
    assert (pooled.language, pooled.router) == (wide.language, wide.router)


# --- FastV --------------------------------------------------------------------------------------------------


def by_masking(predictor, sample, *, keep_fraction, num_tokens):
    """FastV without cache: all tokens in all layers, where later ones do not see those that were dropped."""
    model, base = predictor.model, predictor.model.language.base_model
    batch = collate([predictor.encode_prompt(sample, "What is A?")])
    spliced = model.splice_batch(batch, model.encode_tiles(sample.tiles), full_ratios(sample)[0])
    vision = [int(start) + i for start in spliced.tile_starts for i in range(4)]
    model.language.set_attn_implementation("eager")
    given, ids, dropped = len(spliced.embeddings), [], None
    for _ in range(num_tokens):
        embeddings = [spliced.embeddings, base.embed_tokens(torch.tensor(ids, dtype=torch.int64))]
        hidden = torch.cat(embeddings)[None]
        rotary = base.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
        mask = torch.full((hidden.shape[1],) * 2, -torch.inf).triu(1)
        for number, layer in enumerate(base.layers):
            if number == 1 and dropped is None:
                states = layer.input_layernorm(hidden)
                weights = layer.self_attn(
                    states, position_embeddings=rotary, attention_mask=mask[None, None]
                )[1]
                received = weights[0, :, given - 1].mean(0)
                num_dropped = len(vision) - round(keep_fraction * len(vision))
                dropped = sorted(vision, key=lambda place, of=received: of[place])[:num_dropped]
            if number == 2:
                mask[:, dropped] = -torch.inf
                mask.fill_diagonal_(0)  # what a dropped token computes, nobody sees
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=rotary)
        ids.append(int((base.norm(hidden[0, -1]) @ model.head.T).argmax()))
    return predictor.tokenizer.decode(ids, skip_special_tokens=True).strip()


SIZES = [[(64, 64)], [(64, 32), (32, 32)]]


@torch.no_grad()
@pytest.mark.parametrize("sizes", SIZES, ids=["one image", "two images"])
@pytest.mark.parametrize("keep_fraction", [0.0, 0.3, 0.5])
def test_fastv_answers_as_if_later_layers_did_not_see_what_is_dropped(endless, sizes, keep_fraction):
    answers, full = [], []
    for seed in range(3):
        sample, question = tiled(endless, *sizes, seed=seed), "What is A?"
        answers += [fastv_answers(endless, sample, question, keep_fraction=keep_fraction, max_new_tokens=6)]
        full += [fastv_answers(endless, sample, question, keep_fraction=1, max_new_tokens=6)]
        assert answers[-1] == by_masking(endless, sample, keep_fraction=keep_fraction, num_tokens=6)
    assert answers != full or keep_fraction, "dropping all tokens makes a difference"


def check_that_all_kept_is_as_usual(asked, sizes):
    for seed, prompt in enumerate(["What is A?", "What is F?", ["What is A?", "red", "And B?"]]):
        sample = tiled(asked, *sizes, seed=seed)
        features, ratios = [asked.encode(sample.tiles).detach()], full_ratios(sample)
        (usual,) = asked.answer([sample], [prompt], features=features, ratios=ratios, max_new_tokens=8)
        assert fastv_answers(asked, sample, prompt, keep_fraction=1, max_new_tokens=8) == usual
        again = {"features": features[0], "keep_fraction": 1, "max_new_tokens": 8}
        assert fastv_answers(asked, sample, prompt, **again) == usual


@pytest.mark.parametrize("sizes", [[], *SIZES], ids=["text only", "one image", "two images"])
def test_fastv_that_keeps_everything_answers_as_usual(endless, sizes):
    check_that_all_kept_is_as_usual(endless, sizes)


def test_fastv_ends_where_the_turn_ends(predictor):
    check_that_all_kept_is_as_usual(predictor, SIZES[0])


# --- Serving cost -------------------------------------------------------------------------------------------

# By hand: a layer of the tiny model has 1024 + 512 + 512 + 1024 weights in attention, 3 x 32 x 48 in its MLP.
PER_TOKEN, PER_PAIR, HEAD = 2 * 7680, 2 * 2 * 32, 2 * 32 * 61  # of a layer, of a layer, of the model
KEYS_AND_VALUES = 2 * 16 * 4  # bytes of a token in a layer, float32


def cost(*layers):
    """By hand: the cost of a prompt from its length in each layer."""
    flops = sum(PER_TOKEN * n + PER_PAIR * n * (n + 1) / 2 for n in layers) + HEAD
    return {
        "prefill_gflops": pytest.approx(flops / 1e9, abs=1e-6),
        "kv_cache_mib": pytest.approx(KEYS_AND_VALUES * sum(layers) / 2**20, abs=1e-6),
    }


def test_serving_cost_is_what_is_counted_and_cached_per_layer_and_averaged_over_prompts():
    assert serving_cost(tiny_model(), [300], [400], [400]) == cost(700, 700)
    deep = tiny_model(language={**SMALL, "num_hidden_layers": LAYERS})
    assert serving_cost(deep, [300], [400], [200]) == cost(700, 700, 500, 500), "FastV drops after two layers"
    one, other, both = (serving_cost(deep, *3 * [lengths]) for lengths in ([300], [700], [300, 700]))
    assert both == {name: pytest.approx((one[name] + other[name]) / 2, abs=1e-6) for name in both}


@torch.no_grad()
def test_serving_cost_is_what_pytorch_counts_and_transformers_caches():
    cache, counter = DynamicCache(), FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        given = {"inputs_embeds": torch.randn(1, 700, WIDTH), "past_key_values": cache, "logits_to_keep": 1}
        tiny_model().language(**given)
    upper_half = 2 * PER_PAIR * (700 * 699 / 2)  # this kernel computes all pairs
    assert (counter.get_total_flops() - upper_half) / 1e9 == cost(700, 700)["prefill_gflops"]
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert sum(tensor.nbytes for tensor in tensors) / 2**20 == cost(700, 700)["kv_cache_mib"]
