"""Encoding gives each text its embedding, in its place, whatever it is batched with."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ffn2moe.data.encode import encode
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.sentence import attach
from ffn2moe.literals import Pooling
from ffn2moe.numerics import choose_device
from ffn2moe.sentence import SentenceModules
from tests.texts import make_texts


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_dense(str(tiny_teacher))


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_embeddings_are_in_the_order_of_the_texts_whatever_the_batch(tiny_teacher, pooling):
    model, tokenizer = load_dense(str(tiny_teacher))
    attach(model, SentenceModules(pooling=(pooling,)))
    texts = [*make_texts(9), "dog", "the cat of the house"]
    one_by_one = torch.cat([encode(model, tokenizer, [text], max_length=32) for text in texts])
    together = encode(model, tokenizer, texts, max_length=32, batch_texts=4)
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(texts)))
    assert not together.requires_grad and together.dtype == torch.float32


def test_encoding_equals_the_plain_transformers_way(teacher):
    model, tokenizer = teacher
    texts = make_texts(5)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        hidden_BLD, mask_BL1 = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        expected = torch.nn.functional.normalize((hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1), dim=-1)
    torch.testing.assert_close(encode(model, tokenizer, texts, max_length=24), expected, atol=1e-5, rtol=1e-5)


def test_progress_is_told_batch_by_batch(teacher):
    told = []

    def track(items, total, description):
        told.append((total, description))
        for item in items:
            told.append(len(item))
            yield item

    encode(*teacher, make_texts(5), max_length=16, batch_texts=2, track=track)
    assert told == [(3, "encoding"), 2, 2, 1]


def test_nothing_and_empty_texts_are_refused(teacher):
    with pytest.raises(ValueError, match="no text to encode"):
        encode(*teacher, [], max_length=16)
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode(*teacher, ["dog", " \n"], max_length=16)


def test_a_gpu_that_is_not_there_is_refused():
    assert choose_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert choose_device("auto") == choose_device("cuda") == "cuda"
    else:
        assert choose_device("auto") == "cpu"
        with pytest.raises(ValueError, match="no accelerator"):
            choose_device("cuda")
