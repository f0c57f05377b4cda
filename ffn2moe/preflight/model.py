"""Check the dense model: its weights by their headers, its head, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError

from ffn2moe.choices import HEADS, PROBLEMS, problem_of
from ffn2moe.dense.config import require_padding
from ffn2moe.dense.families import positions
from ffn2moe.dense.weights import weight_files
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.dense import Dense
from ffn2moe.preflight.doubt import Doubt

SAMPLED_TEXTS = 64  # that are tokenised
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # of transformers' configs


def source(case: Case) -> Iterator[str]:
    """Read the config and the headers of the weights; refuse what is no dense model, and weights that are not whole."""
    dense, asked = case.dense, case.request
    config = dense.config.get_text_config()
    experts = next((getattr(config, key, None) for key in EXPERT_KEYS if getattr(config, key, None)), 0)
    if isinstance(experts, int) and experts > 1:
        raise ValueError(
            f"{asked.source} is a mixture of {experts} experts already ({dense.config.model_type}), and only dense "
            "models are decomposed: name the dense model that it was made of"
        )
    try:
        files = set(weight_files(dense.folder).values())
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {asked.source} cannot be read ({error}): a file is cut short or damaged; fetch the folder "
            "again"
        ) from None
    size = sum(file.stat().st_size for file in files) / 2**20
    yield f"{dense.config.model_type} in {dense.folder}, {case.parameters / 1e6:.3g} M weights, {size:.4g} MiB in files"
    if dense.family is None:
        yield Doubt(
            f"{dense.config.model_type!r} is no known family: its FFNs are searched when the weights are read, and "
            "it is converted in memory"
        )
        return
    if case.left_out is not None:
        yield case.left_out
    if case.whole_only is not None:
        yield f"converted in memory, not layer by layer: {case.whole_only}"


def head(case: Case) -> Iterator[str]:
    """Refuse a model whose head cannot be computed for a batch of texts."""
    dense = case.dense
    if dense.head == "classification" and dense.reads == "text":
        require_padding(dense.config, dense.reader, case.request.source)
    means = f", {PROBLEMS[problem_of(dense.config)].gives}" if HEADS[dense.head].classifies else ""
    if dense.sentence is not None:
        means = f" by {dense.sentence.describe()}"
    if dense.head == "seq2seq" and dense.reads == "text" and not _starts_answers(dense):
        raise ValueError(
            f"config.json of {case.request.source} has no decoder_start_token_id, with which an answer begins: add it"
        )
    yield f"{dense.head}: {HEADS[dense.head].gives}{means}"


def _starts_answers(dense: Dense) -> bool:
    """Return whether the token is known with which a decoder begins."""
    file = dense.folder / "generation_config.json"
    generation = json.loads(file.read_text()) if file.is_file() else {}
    keys = ("decoder_start_token_id", "bos_token_id")
    return any(generation.get(key, getattr(dense.config, key, None)) is not None for key in keys)


def reader(case: Case) -> Iterator[str]:
    """Open the tokenizer; refuse one that an export cannot run, or that belongs to another model."""
    dense = case.dense
    if dense.reads != "text":
        return
    tokenizer, longest = dense.reader, positions(dense.config)
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {case.request.source} ({type(tokenizer).__name__}) runs in Python only, and an export "
            "runs tokenizer.json: save the folder with a fast tokenizer"
        )
    vocabulary = dense.config.get_text_config().vocab_size
    _require_own(case, tokenizer, vocabulary)
    if len(tokenizer) > vocabulary:
        yield Doubt(
            f"it has {len(tokenizer)} tokens and the model knows {vocabulary}: a text with one of the others is refused"
        )
    of = f" of {longest} at most" if longest else ""
    yield f"{len(tokenizer)} tokens; texts are cut to {case.max_length} tokens{of}"


def _require_own(case: Case, tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError where the tokenizer gives tokens that the model does not know."""
    name = case.request.source
    for role in ("pad", "bos", "eos", "cls", "sep", "unk"):
        number = getattr(tokenizer, f"{role}_token_id", None)
        if number is not None and number >= vocabulary:
            raise ValueError(
                f"the {role}_token of {name} has the id {number}, and its model knows {vocabulary} tokens: give "
                f"another {role}_token in tokenizer_config.json, or resize the model's embeddings"
            )
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer of {name} knows {tokenizer.vocab_size} tokens and its model {vocabulary}: they belong to "
            "different models; restore the folder"
        )
    texts = case.sample.texts[:SAMPLED_TEXTS]
    largest = max((max(ids, default=0) for ids in tokenizer(texts)["input_ids"]), default=0) if texts else 0
    if largest >= vocabulary:
        raise ValueError(
            f"the texts hold token {largest} and the model of {name} knows {vocabulary}: the tokenizer belongs to "
            "another model; restore the folder"
        )
