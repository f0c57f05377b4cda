"""Token sequences: packing loses and invents nothing, and a model's own texts follow its distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ffn2moe.data.batches import first_by_length, pack
from ffn2moe.data.generate import end_of_text, require_varied, sample_tokens, texts_in


@given(st.lists(st.lists(st.integers(3, 9), max_size=12), max_size=12), st.integers(1, 7))
def test_packing_keeps_the_order_and_ends_every_document(documents, length):
    joined = [token for ids in documents for token in [*ids, 2]]
    if len(joined) < length:
        with pytest.raises(ValueError, match="do not fill one block"):
            pack(documents, length, 2)
        return
    blocks = pack(documents, length, 2)
    assert all(len(block) == length for block in blocks)
    flat = [token for block in blocks for token in block]
    assert flat == joined[: len(flat)] and len(joined) - len(flat) < length


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1), st.integers(1, 60))
def test_the_first_texts_that_hold_so_many_tokens_come_by_length(texts, tokens):
    found = first_by_length(texts, tokens)
    assert sorted(found) == list(range(len(found)))
    assert [len(texts[index]) for index in found] == sorted(len(texts[index]) for index in found)
    total = sum(len(texts[index]) for index in found)
    assert total >= tokens or len(found) == len(texts)
    assert total - len(texts[max(found)]) < tokens


def test_packing_adds_no_second_end_and_none_without_a_token_for_it():
    assert pack([[5, 2], [6]], 4, 2) == [[5, 2, 6, 2]]
    assert pack([[5], [6]], 2, None) == [[5, 6]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def test_the_same_seed_draws_the_same_texts_and_another_seed_others(model):
    first, again, other = (sample_tokens(model, count=5, length=12, seed=s, bos=1, batch=2) for s in (0, 0, 1))
    assert first == again != other
    assert len(first) == 5 and all(text[0] == 1 and len(text) <= 12 for text in first)


def test_a_text_ends_at_its_first_end_of_text(model):
    texts = sample_tokens(model, count=40, length=32, seed=0, bos=1, batch=40)
    ended = [text for text in texts if 2 in text]
    assert ended and all(text.index(2) == len(text) - 1 for text in ended)
    assert all(len(text) == 32 for text in texts if 2 not in text)


def test_without_a_first_token_texts_begin_anywhere_in_the_vocabulary(model):
    texts = sample_tokens(model, count=64, length=2, seed=0, bos=None, batch=64)
    assert len({text[0] for text in texts}) > 8


@torch.no_grad()
def test_the_cache_changes_no_probability(model):
    texts = sample_tokens(model, count=4000, length=3, seed=0, bos=1, batch=4000)
    ids = torch.tensor([text for text in texts if len(text) == 3])
    second = torch.bincount(ids[:, 1], minlength=16).argmax().item()
    drawn = torch.bincount(ids[ids[:, 1] == second, 2], minlength=16).double()
    expected = model(torch.tensor([[1, second]])).logits[0, -1].softmax(-1).double()
    assert (drawn / drawn.sum() - expected).abs().max() < 5 / drawn.sum().sqrt()


def test_a_model_that_cannot_be_sampled_from_is_refused(model):
    with pytest.raises(ValueError, match="33 tokens are longer than the 32 positions"):
        sample_tokens(model, count=1, length=33, seed=0, bos=1, batch=1)
    broken = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sample_tokens(broken, count=1, length=4, seed=0, bos=1, batch=1)


def test_the_end_of_text_is_the_generation_configs(model):
    assert end_of_text(model) == {2}
    model.generation_config.eos_token_id = [2, 5]
    assert end_of_text(model) == {2, 5}
    model.generation_config.eos_token_id = 2


def test_a_model_that_repeats_one_token_is_refused(model):
    stuck = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        stuck.model.layers.apply(lambda part: [one.zero_() for one in part.parameters(recurse=False)])
        stuck.model.embed_tokens.weight[:] = stuck.model.embed_tokens.weight[1].clone()
        stuck.lm_head.weight.zero_()
        stuck.lm_head.weight[7] = 100 * stuck.model(torch.tensor([[1]])).last_hidden_state[0, 0]
    with pytest.raises(ValueError, match=r"100 % of what the model writes is the token 7, .* give texts instead"):
        sample_tokens(stuck, count=8, length=16, seed=0, bos=1, batch=8)
    require_varied([[1, 7, 7, 7]])  # too few to say


def test_in_more_time_a_model_writes_more_texts_and_always_a_batch(model):
    how = {"length": 16, "bos": 1, "batch": 4}
    assert texts_in(model, 0.0, most=100, **how) == 4
    assert texts_in(model, 0.0, most=3, **how) == 3
    assert texts_in(model, 1e6, most=1000, **how) == 1000


def test_texts_drawn_in_bfloat16_leave_the_weights_as_they_were(model):
    before = {name: one.clone() for name, one in model.named_parameters()}
    texts = sample_tokens(model, count=8, length=12, seed=0, bos=1, batch=4, bf16=True)
    assert len(texts) == 8
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], one) and after[name].dtype == one.dtype for name, one in before.items())
