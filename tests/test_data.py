"""Token sequences: packing loses and invents nothing, and a model's own texts follow its distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from ffn2moe.data.batches import first_by_length, pack
from ffn2moe.data.generate import end_of_text, sample_tokens


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
