"""Each family of language models computes what it computes in transformers, or is refused in a sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from tests.support.tiny import tiny_spec
from vico_pl.model.language import Prefixes, build_language_model, check_parity, run_packed

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = {  # name: (model_type and settings that matter, why it is refused)
    "Llama, SmolLM2": ({"model_type": "llama"}, None),
    "Qwen2": ({"model_type": "qwen2"}, None),
    "Qwen2 with a sliding window": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
        None,
    ),
    "Qwen3": ({"model_type": "qwen3"}, None),
    "Qwen3-MoE": ({"model_type": "qwen3_moe"}, None),
    "Qwen3-Next": ({"model_type": "qwen3_next"}, "packed samples would see each other"),
    "Gemma": ({"model_type": "gemma"}, None),
    "Gemma 2": ({"model_type": "gemma2"}, "final_logit_softcapping is set"),
    "Gemma 3": ({"model_type": "gemma3_text"}, None),
    "Phi-1, Phi-2": ({"model_type": "phi"}, "its output layer has a bias"),
    "Phi-3": ({"model_type": "phi3", "sliding_window": 2047}, None),
    "Mistral": ({"model_type": "mistral", "sliding_window": 4096}, None),
    "SmolLM3": ({"model_type": "smollm3"}, None),
    "Granite": ({"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 12.0}, None),
    "Cohere": ({"model_type": "cohere", "logit_scale": 0.0625}, None),
    "Cohere 2": ({"model_type": "cohere2"}, None),
    "OLMo 2": ({"model_type": "olmo2"}, None),
    "Falcon": ({"model_type": "falcon"}, "packed samples would see each other"),
    "StableLM": ({"model_type": "stablelm"}, "packed samples cannot run through it"),
    "Nemotron": ({"model_type": "nemotron"}, "packed samples cannot run through it"),
}


def check(settings):
    settings = dict(settings)
    check_parity(AutoConfig.for_model(settings.pop("model_type"), **settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_transformers_computes_or_is_refused(name):
    settings, problem = FAMILIES[name]
    if problem is None:
        check(settings)
    else:
        with pytest.raises(ValueError, match=f"is not supported: .*{problem}") as caught:
            check(settings)
        assert "\n" not in str(caught.value)


def test_the_page_lists_the_families():
    kinds = {name: (settings["model_type"], problem) for name, (settings, problem) in FAMILIES.items()}
    rows = [f"| {name} | `{kind}` | {problem or 'supported'} |" for name, (kind, problem) in kinds.items()]
    table = PAGE.read_text().partition("<!-- families: begin -->\n")[2].partition("<!-- families: end")[0]
    assert table.splitlines()[2:] == rows


def test_the_check_runs_where_models_are_built_without_values_and_draws_no_random_number():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.device("meta"), no_init_weights():
        check_parity(AutoConfig.for_model("llama", attention_bias=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_segment_that_continues_a_prefix_keeps_to_the_sliding_window():
    """As one run, though the window begins in the prefix."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = AutoConfig.for_model("mistral", **sizes, **heads, sliding_window=5)
    model = AutoModelForCausalLM.from_config(config).eval()
    embeddings, kept = torch.randn(20, 32), {}
    with torch.no_grad():
        whole = run_packed(model, embeddings, [20])
        run_packed(model, embeddings[:12], [12], keep=kept)
        rest = run_packed(model, embeddings[12:], [8], prefixes=Prefixes(kept=kept, starts=[0], lengths=[12]))
    torch.testing.assert_close(rest, whole[12:], rtol=1e-5, atol=1e-5)


def test_code_that_a_config_names_never_runs(tmp_path, monkeypatch):
    (tmp_path / "modeling_other.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    auto_map = {"AutoModelForCausalLM": f"{tmp_path}--modeling_other.Other"}
    with pytest.raises(ValueError, match="model_type is 'vit', no causal language model"):
        build_language_model({"model_type": "vit", "hidden_size": 128, "auto_map": auto_map})


def test_the_configuration_is_left_as_it_was():
    config = tiny_spec().language
    build_language_model(config)
    assert config == tiny_spec().language


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt_of_nobody"}, "gpt_of_nobody"),
        ({"model_type": "qwen3", "hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"model_type": "gemma2", "num_hidden_layers": 2}, "final_logit_softcapping is set"),
    ],
)
def test_configs_of_no_usable_model_are_refused_in_a_sentence(config, said):
    with pytest.raises(ValueError, match=r"language model: |Unrecognized") as caught:
        build_language_model(config)
    assert said in str(caught.value)
