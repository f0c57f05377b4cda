"""Twelve kinds of sentence-transformers folders around tiny models, saved by the library itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.conftest import make_tiny_bert

TEXTS = [
    "The Cat of the house",
    "return the sum of the values along an axis",
    "dog",
    "red green blue. " * 30,  # longer than every limit below
    "Open the file, read a line and close it.",
]


def _modules(transformer: Any, **options: Any) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    width = transformer.get_embedding_dimension()
    return [transformer, Pooling(width, options.get("pooling", "mean")), Normalize()]


def _transformer(folder: Path, **options: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    return Transformer(str(folder), **options)


def _pooled(mode: Any) -> Callable[[Path, Path], None]:
    def save(bert: Path, out: Path) -> None:
        _save(_modules(_transformer(bert, max_seq_length=48), pooling=mode), out)

    return save


def _save(modules: list[Any], out: Path, **options: Any) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=modules, device="cpu", **options).save(str(out), create_model_card=False)


def _dense(bert: Path, out: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm

    transformer, pooling, normalize = _modules(_transformer(bert, max_seq_length=48), pooling=("cls", "mean"))
    torch.manual_seed(1)
    dense = Dense(2 * 32, 20, activation_function=nn.ReLU())
    _save([transformer, pooling, dense, LayerNorm(20), Dense(20, 20, bias=False, use_residual=True), normalize], out)


def _not_normalised(bert: Path, out: Path) -> None:
    _save(_modules(_transformer(bert, max_seq_length=48))[:2], out, similarity_fn_name="dot")


def _prompts(bert: Path, out: Path) -> None:
    prompts = {"query": "search query: ", "passage": "document: "}
    _save(_modules(_transformer(bert, max_seq_length=48)), out, prompts=prompts, default_prompt_name="passage")


def _old_layout(bert: Path, out: Path) -> None:
    """Write a folder as versions 0.2 to 2 did: the transformer in a subfolder, one flag for each pooling."""
    made = out.with_name("made")
    _save(_modules(_transformer(bert), pooling="max"), made)
    out.mkdir()
    (out / "0_Transformer").mkdir()
    for file in made.iterdir():
        if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, out / "0_Transformer" / file.name)
    _write(out / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 48})
    flags = {f"pooling_mode_{name}_tokens": name == "max" for name in ("max", "mean", "mean_sqrt_len")}
    (out / "1_Pooling").mkdir()
    _write(out / "1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_cls_token": False} | flags)
    names = ("0_Transformer", "1_Pooling", "2_Normalize")
    _write(
        out / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{path[2:]}"}
            for i, path in enumerate(names)
        ],
    )


def _of_version_5(bert: Path, out: Path) -> None:
    """Write a folder as version 5.0 did: all flags of the pooling, names of classes in `models`."""
    _save(_modules(_transformer(bert), pooling="weightedmean"), out)
    names = ("mean", "max", "mean_sqrt_len", "weightedmean")
    flags = {f"pooling_mode_{name}_tokens": name == "weightedmean" for name in names}
    flags |= {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": False, "include_prompt": True}
    _write(out / "1_Pooling/config.json", {"word_embedding_dimension": 32} | flags)
    _write(out / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    chain = json.loads((out / "modules.json").read_text())
    for entry in chain:
        entry["type"] = f"sentence_transformers.models.{entry['type'].rsplit('.', 1)[1]}"
    _write(out / "modules.json", chain)


def _cased_bert(folder: Path) -> Path:
    """A BERT whose tokenizer tells large letters from small ones, and knows the small ones alone."""
    from transformers import BertTokenizerFast

    make_tiny_bert(folder, num_hidden_layers=1)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=False, model_max_length=64)
    assert tokenizer("The")["input_ids"] != tokenizer("the")["input_ids"]
    tokenizer.save_pretrained(folder)
    return folder


def _lowered(bert: Path, out: Path) -> None:
    """Save a cased tokenizer whose texts the library lowers."""
    _save(_modules(_transformer(_cased_bert(out.with_name("cased")), max_seq_length=48, do_lower_case=True)), out)


def _cased(bert: Path, out: Path) -> None:
    _save(_modules(_transformer(_cased_bert(out.with_name("cased")), max_seq_length=48)), out)


def _long(length: int) -> Callable[[Path, Path], None]:
    def save(bert: Path, out: Path) -> None:
        long = make_tiny_bert(out.with_name("long"), num_hidden_layers=1, max_position_embeddings=512)
        _save(_modules(_transformer(long, max_seq_length=length)), out)

    return save


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def _decoder(bert: Path, out: Path) -> None:
    """A language model that pads on the left, and is pooled by its last token."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

    folder = out.with_name("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": True}
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    prompts = {"query": "Given a query, find: ", "document": ""}
    _save(_modules(_transformer(folder, max_seq_length=48), pooling="lasttoken"), out, prompts=prompts)


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "mean": _pooled("mean"),
    "CLS": _pooled("cls"),
    "max": _pooled("max"),
    "last token": _pooled("lasttoken"),
    "mean by the root of the length": _pooled("mean_sqrt_len_tokens"),
    "weighted mean, saved by 5.0": _of_version_5,
    "CLS and mean, Dense, LayerNorm, Dense with residual": _dense,
    "no Normalize": _not_normalised,
    "prompts and a default prompt": _prompts,
    "old layout, max": _old_layout,
    "cased": _cased,
    "cased, lowered by the library": _lowered,
    "256 tokens": _long(256),
    "512 tokens": _long(512),
    "decoder, last token": _decoder,
}


def save(name: str, folder: Path) -> Path:
    """Save the folder of a name as `folder`/model, and return its path."""
    FOLDERS[name](make_tiny_bert(folder / "bert", num_hidden_layers=1), folder / "model")
    return folder / "model"
