"""Tiny real models, made on the spot: no network, no GPU."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "to",
    "in",
    "is",
    "are",
    "return",
    "returns",
    "array",
    "matrix",
    "value",
    "values",
    "index",
    "sum",
    "mean",
    "list",
    "string",
    "number",
    "file",
    "read",
    "write",
    "open",
    "close",
    "sort",
    "sorted",
    "compute",
    "given",
    "function",
    "object",
    "class",
    "method",
    "type",
    "error",
    "raise",
    "if",
    "not",
    "none",
    "true",
    "false",
    "shape",
    "size",
    "axis",
    "element",
    "elements",
    "first",
    "last",
    "new",
    "old",
    "name",
    "path",
    "data",
    "table",
    "row",
    "column",
    "graph",
    "node",
    "edge",
    "tree",
    "map",
    "filter",
    "apply",
    "linear",
    "random",
    "normal",
    "distribution",
    "test",
    "sample",
    "fit",
    "predict",
    "score",
    "model",
    "layer",
    "token",
    "text",
    "word",
    "sentence",
    "query",
    "document",
    "search",
    "parse",
    "format",
    "date",
    "time",
    "day",
    "week",
    "month",
    "year",
    "word2",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "house",
    "garden",
    "river",
    "mountain",
    "music",
    "paint",
    "color",
    "light",
    "dark",
    "fast",
    "slow",
]


def make_tokenizer(folder: Path) -> None:
    """A WordPiece tokenizer over a small vocabulary, saved as transformers' fast BERT tokenizer."""
    from transformers import BertTokenizerFast

    pieces = [
        *"abcdefghijklmnopqrstuvwxyz0123456789.,:;()'`_-",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"),
    ]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*pieces, *WORDS])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)


def make_tiny_bert(folder: Path, *, ffn_width: int = 64, seed: int = 0, **config: object) -> Path:
    """A random BERT with 2 layers, D = 32 and a WordPiece tokenizer, as a Hugging Face folder."""
    from transformers import BertConfig, BertModel

    make_tokenizer(folder)
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": len((folder / "vocab.txt").read_text().split()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": ffn_width,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    BertModel(BertConfig(**(settings | config)), add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_tiny_llama(folder: Path, *, ffn_width: int = 48, seed: int = 0) -> Path:
    """A random LLaMA with 2 layers and D = 32, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len((folder / "vocab.txt").read_text().split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=ffn_width,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_tiny_classifier(folder: Path, *, classes: tuple[str, ...] = ("negative", "positive")) -> Path:
    """A random BERT with a head of classes, 2 layers and D = 32, as a Hugging Face folder."""
    from transformers import BertConfig, BertForSequenceClassification

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len((folder / "vocab.txt").read_text().split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def make_tiny_t5(folder: Path, *, gated: bool = False) -> Path:
    """A random T5 with 2 layers on either side and D = 32, as a Hugging Face folder."""
    from transformers import T5Config, T5ForConditionalGeneration

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len((folder / "vocab.txt").read_text().split()),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu",
        pad_token_id=0,
        eos_token_id=3,
        decoder_start_token_id=0,
        initializer_factor=1.5,  # so that answers differ from text to text
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("teacher") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_teacher_gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("teacher") / "tiny-llama")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A workspace in which the stage `export` has run on a tiny mixture; the export is models/exported in it."""
    from tasks import export
    from tests.mixtures import make_workspace
    from tests.texts import make_stage

    root = make_workspace(tmp_path_factory.mktemp("exported"), tiny_teacher)
    settings = ("name=tiny", "compute.threads=1", "export.parity_texts=12", "export.engines=[onnxruntime]")
    export.run(make_stage("export", root, *settings))
    return root
