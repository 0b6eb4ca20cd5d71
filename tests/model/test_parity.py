"""Each family of language models computes what it computes in transformers, or is refused in a sentence."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vico_pl.model.language import Prefixes, run_packed
from vico_pl.model.parity import check_parity

SUPPORTED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
    "gemma": {},
    "gemma3_text": {},
    "phi3": {"sliding_window": 2047},
    "mistral": {"sliding_window": 4096},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {},
    "olmo2": {},
}
REFUSED = {
    "gemma2": ({}, "final_logit_softcapping is set"),
    "gemma3_text": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
    "phi": ({}, "its output layer has a bias"),
    "falcon": ({}, ".*packed samples would see each other"),
    "qwen3_next": ({}, "packed samples would see each other"),  # recurrent layers
    "stablelm": ({}, "packed samples cannot run through it"),
    "nemotron": ({}, "packed samples cannot run through it"),
}


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_whose_logits_are_those_of_transformers_is_accepted(family):
    check_parity(AutoConfig.for_model(family, **SUPPORTED[family]))


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_would_be_trained_on_another_function_is_refused(family):
    settings, problem = REFUSED[family]
    with pytest.raises(ValueError, match=f"model_type '{family}' .* is not supported: {problem}") as caught:
        check_parity(AutoConfig.for_model(family, **settings))
    assert "\n" not in str(caught.value)


def test_the_check_draws_no_random_number_and_leaves_the_device_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.device("meta"):
        check_parity(AutoConfig.for_model("llama", rope_theta=1234.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_segment_that_continues_a_prefix_keeps_to_the_sliding_window():
    """As one run, though the window begins in the prefix."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model("mistral", **sizes, **heads, sliding_window=5)
    model = AutoModelForCausalLM.from_config(config).eval()
    embeddings, positions = torch.randn(20, 32), torch.arange(20)
    kept = {}
    with torch.no_grad():
        whole = run_packed(model, embeddings, positions, [20])
        run_packed(model, embeddings[:12], positions[:12], [12], keep=kept)
        rest = run_packed(
            model,
            embeddings[12:],
            positions[12:],
            [8],
            prefixes=Prefixes(kept=kept, starts=[0], lengths=[12]),
        )
    torch.testing.assert_close(rest, whole[12:], rtol=1e-5, atol=1e-5)
