"""Packed samples, with and without prefixes, equal samples one by one; the same by flash-attn."""

import copy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support.tiny import WIDTH, tiny_model
from vico_pl.model.language import (
    Prefixes,
    check_flash_attention,
    run_packed,
    set_packed_attention,
)

LENGTHS = [3, 7, 1, 5]


@pytest.fixture
def language():
    return tiny_model(router_heads=None).language


def embeddings(lengths, *, seed=1):
    return torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))


def one_by_one(model, x, lengths):
    """Each sample alone, with transformers' own attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    states = [model.base_model(inputs_embeds=part[None]).last_hidden_state[0] for part in x.split(lengths)]
    return torch.cat(states)


def test_packed_samples_equal_samples_one_by_one(language):
    x = embeddings(LENGTHS)
    packed = run_packed(language, x, LENGTHS)
    torch.testing.assert_close(packed, one_by_one(language, x, LENGTHS), rtol=0, atol=1e-5)


def test_packed_gradients_equal_those_of_samples_one_by_one(language):
    packed, alone = embeddings(LENGTHS).requires_grad_(), embeddings(LENGTHS).requires_grad_()
    weights = embeddings(LENGTHS, seed=2)
    (run_packed(language.train(), packed, LENGTHS) * weights).sum().backward()
    (one_by_one(language, alone, LENGTHS) * weights).sum().backward()
    torch.testing.assert_close(packed.grad, alone.grad, rtol=1e-4, atol=1e-5)


# Segments that go on from the samples of LENGTHS: after how many tokens of which, and by how many.
PREFIXES = [(1, 4, 3), (1, 0, 2), (3, 5, 1), (1, 7, 4)]


def run_after_prefixes(model, x, more):
    starts, kept = [0, 3, 10, 11], {}
    run_packed(model, x, LENGTHS, keep=kept)
    prefixes = Prefixes(
        kept=kept, starts=[starts[s] for s, _, _ in PREFIXES], lengths=[length for _, length, _ in PREFIXES]
    )
    return run_packed(model, more, [n for _, _, n in PREFIXES], prefixes=prefixes)


def whole_after_prefixes(model, x, more):
    """Each continuation as one sample, prefix and all."""
    parts, found = x.split(LENGTHS), []
    for (sample, length, n), own in zip(PREFIXES, more.split([n for _, _, n in PREFIXES]), strict=True):
        whole = torch.cat([parts[sample][:length], own])
        found.append(one_by_one(model, whole, [length + n])[length:])
    return torch.cat(found)


def test_segments_go_on_from_tokens_of_an_earlier_pass(language):
    x, more = embeddings(LENGTHS), embeddings([10], seed=2)
    with torch.no_grad():
        found, expected = run_after_prefixes(language, x, more), whole_after_prefixes(language, x, more)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def flash_calls(monkeypatch):
    """A flash-attn package that computes the same in plain PyTorch; returns how it was called."""
    calls = []

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **rest):
        bounds = {"cu_seqlens_q": cu_seqlens_q.tolist(), "cu_seqlens_k": cu_seqlens_k.tolist()}
        calls.append({"q": q, "k": k, "v": v, "causal": causal, **bounds, **rest})
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        splits = [
            x.transpose(0, 1).split(bounds.diff().tolist(), dim=1)
            for x, bounds in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        ]

        def attend(q, k, v):
            num_queries, num_keys = q.shape[1], k.shape[1]
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True)

        return torch.cat(list(map(attend, *splits)), dim=1).transpose(0, 1)  # S heads width

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func, package.__spec__ = varlen, ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return calls


def test_flash_attention_computes_the_same_in_one_call_per_layer(language, flash_calls):
    x = embeddings(LENGTHS)
    expected = run_packed(language, x, LENGTHS)
    set_packed_attention(language, "flash")
    torch.testing.assert_close(run_packed(language, x, LENGTHS), expected)
    assert len(flash_calls) == 2
    first = flash_calls[0]
    assert first["cu_seqlens_q"] == first["cu_seqlens_k"] == [0, 3, 10, 11, 16]
    assert (first["max_seqlen_q"], first["max_seqlen_k"], first["dropout_p"]) == (7, 7, 0.0)
    assert first["causal"]
    assert (first["q"].shape, first["k"].shape, first["v"].shape) == ((16, 2, 16), (16, 1, 16), (16, 1, 16))


def test_flash_attention_goes_on_from_tokens_of_an_earlier_pass(language, flash_calls):
    x, more = embeddings(LENGTHS), embeddings([10], seed=2)
    expected = run_after_prefixes(language, x, more)
    set_packed_attention(language, "flash")
    torch.testing.assert_close(run_after_prefixes(language, x, more), expected)
    last = flash_calls[-1]
    assert (last["cu_seqlens_q"], last["cu_seqlens_k"]) == ([0, 3, 5, 6, 10], [0, 7, 9, 15, 26])
    assert (last["max_seqlen_q"], last["max_seqlen_k"]) == (4, 11)


def test_flash_attention_is_given_half_precision_under_autocast(language, flash_calls):
    set_packed_attention(language, "flash")
    with torch.autocast("cpu", torch.bfloat16):
        run_packed(language, embeddings(LENGTHS), LENGTHS)
    assert {flash_calls[0][name].dtype for name in "qkv"} == {torch.bfloat16}


def test_flash_attention_is_refused_where_it_cannot_run(flash_calls, monkeypatch):
    check_flash_attention(torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"runs on CUDA devices, but this run is on cpu; set model\.attention=sdpa"
    ):
        check_flash_attention(torch.device("cpu"))
    monkeypatch.setattr("vico_pl.model.language.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="flash-attn is not installed; pip install flash-attn"):
        check_flash_attention(torch.device("cuda"))


@pytest.mark.gpu
def test_the_real_flash_attention_computes_the_same(language):
    pytest.importorskip("flash_attn")
    language.to("cuda", torch.bfloat16)
    x = embeddings(LENGTHS).to("cuda", torch.bfloat16)
    expected = run_packed(language, x, LENGTHS)
    set_packed_attention(language, "flash")
    found = run_packed(language, x, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
