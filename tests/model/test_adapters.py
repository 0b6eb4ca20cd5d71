import sys

import pytest
import torch
from torch import nn

from tests.support.tiny import experts, tiny_model, tiny_spec
from vico_pl.config import RunConfig
from vico_pl.model.adapters import LoraConfig, adapters_merged, adapters_off, add_adapters, own_parameters
from vico_pl.model.families.folder import load_model, save_model
from vico_pl.stages.pretrain import PretrainStage

LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
EXPERTS = experts()


@pytest.fixture(params=[tiny_spec().language, EXPERTS], ids=["dense", "experts"])
def language(request):
    return request.param


def adapted(model, *, dtype=torch.float32, trained=True, **config):
    """Give a model adapters, with weights as after some training."""
    model.to(dtype)
    add_adapters(model.language, LoraConfig(**{"rank": 4, **config}))
    for name, parameter in model.language.named_parameters():
        if trained and "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def states(model, batch):
    with torch.no_grad():
        return model.response_states(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))


def layers_with_adapters(model):
    names = [name for name, _ in model.language.named_modules() if name.endswith("lora_A.default")]
    return {name.split(".")[-3] for name in names}


def test_a_model_keeps_its_class_and_its_outputs_until_its_adapters_are_trained(model, batch):
    expected, before = states(model, batch), type(model.language)
    adapted(model, trained=False)
    assert type(model.language) is before
    assert torch.equal(states(model, batch), expected)
    assert not torch.equal(states(adapted(tiny_model()), batch), expected)


def test_adapters_alone_are_trained(model):
    adapted(model)
    trained = [name for name, p in model.language.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert all(p.requires_grad for p in model.connectors.parameters())


@pytest.mark.parametrize(("targets", "layers"), [("all-linear", set(LAYERS)), (["q_proj"], {"q_proj"})])
def test_targets_choose_the_layers_and_the_output_layer_is_never_one(model, targets, layers):
    assert layers_with_adapters(adapted(model, targets=targets)) == layers


def test_adapters_are_float32_and_merged_weights_of_the_type_of_the_model(model, batch):
    adapted(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.language.parameters() if p.requires_grad} == {torch.float32}
    assert model.head.dtype == torch.bfloat16
    assert states(model, batch).dtype == torch.bfloat16
    with adapters_merged(model):
        assert {p.dtype for p in model.language.parameters()} == {torch.bfloat16}


def test_with_adapters_off_a_model_is_what_it_was(language, batch):
    model = tiny_model(language=language)
    expected = states(model, batch)
    adapted(model)
    with adapters_off(model):
        assert torch.equal(states(model, batch), expected)
        assert any(p.requires_grad for p in model.language.parameters())
    assert not torch.equal(states(model, batch), expected)


def test_merged_adapters_are_in_the_weights_under_the_usual_names(language, batch):
    model = tiny_model(language=language)
    names = model.state_dict().keys()
    expected = states(adapted(model), batch)
    with adapters_merged(model):
        assert model.state_dict().keys() == names
        torch.testing.assert_close(states(model, batch), expected, rtol=0, atol=1e-5)
    assert torch.equal(states(model, batch), expected)
    with adapters_off(model):
        assert torch.equal(states(model, batch), states(tiny_model(language=language), batch))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_folder_knows_nothing_of_adapters(tmp_path, batch, language, tied):
    model = adapted(tiny_model(language={**language, "tie_word_embeddings": tied}))
    with adapters_merged(model):
        save_model(model, tmp_path)
    torch.testing.assert_close(states(load_model(tmp_path), batch), states(model, batch), rtol=0, atol=1e-5)


def test_own_parameters_are_named_as_without_adapters(language):
    model = tiny_model(language=language)
    names = dict(model.language.named_parameters()).keys()
    assert own_parameters(adapted(model).language).keys() == names
    assert own_parameters(model.vision).keys() == dict(model.vision.named_parameters()).keys()


def test_experts_have_adapters_of_their_own_that_are_trained(batch):
    model = adapted(tiny_model(language=EXPERTS), trained=False)
    hidden = model.response_states(batch, model.encode_tiles(batch.tiles), model.full_ratios(batch))
    hidden.square().sum().backward()
    trained = {name: p for name, p in model.language.named_parameters() if p.requires_grad}
    assert sum(".experts." in name and "lora_B" in name for name in trained) == 4  # two weights, two layers
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)


def test_adapters_of_experts_that_should_have_dropout_are_refused():
    model = tiny_model(language=EXPERTS)
    with pytest.raises(ValueError, match=r"dropout is 0.1, .*targets to some of k_proj, o_proj"):
        adapted(model, dropout=0.1)
    adapted(model, dropout=0.1, targets=["q_proj"])


def test_targets_that_the_model_lacks_are_reported_with_those_it_has(model):
    with pytest.raises(ValueError, match=r"names lm_head, qproj; .* are down_proj, gate_proj, k_proj"):
        adapted(model, targets=["qproj", "v_proj", "lm_head"])


def test_adapters_without_peft_are_refused_with_the_command_that_installs_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'vico_pl\[lora\]'"):
        adapted(model)


NEW = [2, 4]  # token 2 begins an image in every sample, 4 is in no text


def with_new_tokens(*, tied=False, **config):
    language = {**tiny_spec().language, "tie_word_embeddings": tied}
    model = tiny_model(language=language, router_heads=None)
    model.language.requires_grad_(requires_grad=False)
    if config:
        adapted(model, **config)
    model.train_tokens(NEW)
    return model


@pytest.mark.parametrize("config", [{}, {"rank": 2}], ids=["frozen", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_and_all_other_rows_are_kept(tmp_path, batch, tied, config):
    model = with_new_tokens(tied=tied, **config)
    before = [w.clone() for w in (model.language.get_input_embeddings().weight, model.head)]
    stage = PretrainStage(RunConfig(stage="pretrain", run_dir="x"), model)
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    loss = stage.step(batch).loss_sum
    loss.backward()
    optimizer.step()
    assert stage.step(batch).loss_sum < loss
    trained = states(model, batch)
    with adapters_merged(model):
        save_model(model, tmp_path)
        torch.testing.assert_close(states(model, batch), trained, rtol=0, atol=1e-4)
    assert torch.equal(model.language.get_input_embeddings().weight, before[0])
    restored = load_model(tmp_path)
    torch.testing.assert_close(states(restored, batch), trained, rtol=0, atol=1e-4)
    torch.testing.assert_close(restored.head, model.head, rtol=0, atol=0)
    for own, old in zip(
        (restored.language.get_input_embeddings().weight, restored.head), before, strict=True
    ):
        changed = (own != old).any(1).nonzero().flatten().tolist()
        # Logits have a gradient for every row, embeddings only for tokens that are read.
        assert changed == (NEW if tied or own is restored.head else NEW[:1])


def test_embeddings_of_new_tokens_are_scaled_as_those_of_others(batch):
    settings = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16}
    model = tiny_model(language={"model_type": "gemma3_text", **settings, **heads}, router_heads=None)
    expected = states(model, batch)
    model.train_tokens(NEW)
    assert torch.equal(states(model, batch), expected)
