"""Classifiers with all experts active serve what transformers' pipelines and CrossEncoder do, in PyTorch and ONNX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from sentence_transformers import CrossEncoder

import ffn2moe
from ffn2moe.choices import PROBLEMS, problem_of
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx.write import export_model, write_manifest
from tests.conftest import make_tokenizer
from tests.mixtures import carve

TEXTS = [
    "the red house",
    "a cat in the garden",
    "returns the sorted list of all values, given an array of numbers",
    "Music",
    "the first graph of the dark river and the green mountain is fast",
]
PAIRS = [(TEXTS[index], TEXTS[(index * 2 + 1) % 5]) for index in range(5)]
LONGEST = 150  # tokens
BODY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
PROBLEM_TYPES = {
    "single_label": (3, None),
    "multi_label": (4, "multi_label_classification"),
    "regression": (1, "regression"),
    "one_label": (1, None),
}
NER = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def make_bpe(folder: Path) -> None:
    """A byte-level tokenizer of RoBERTa over characters: it gives no token_type_ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<mask>", *letters])}
    tf.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=LONGEST).save_pretrained(folder)


def make(folder: Path, kind: str, head: str = "SequenceClassification", **settings: Any) -> Path:
    """A random classifier with its own kind of tokenizer, as a Hugging Face folder."""
    body = dict(BODY)
    if kind == "roberta":
        make_bpe(folder)
        body |= {"type_vocab_size": 1}
    else:
        make_tokenizer(folder)
    if kind in ("distilbert", "llama"):  # whose models take no token_type_ids
        tf.DistilBertTokenizer(str(folder / "vocab.txt"), model_max_length=LONGEST).save_pretrained(folder)
    if kind == "distilbert":
        body |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
    if kind == "llama":
        body |= {"num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "distilbert": "DistilBert",
        "llama": "Llama",
        "deberta-v2": "DebertaV2",
        "electra": "Electra",
    }
    config = tf.AutoConfig.for_model(kind, **body, vocab_size=len(tf.AutoTokenizer.from_pretrained(folder)), **settings)
    torch.manual_seed(0)
    model = getattr(tf, f"{names[kind]}For{head}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("classifier", "score")):  # so that scores differ from text to text
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def of_problem(problem: str) -> dict[str, Any]:
    labels, declared = PROBLEM_TYPES[problem]
    return {"num_labels": labels, "problem_type": declared}


def exported(
    dense: Path, out: Path, head: str = "classification", plans: tuple[str, ...] = ("sorted",)
) -> tuple[Any, dict[str, Any]]:
    """The mixture of a dense model with all experts active, in PyTorch and as an export."""
    student, spec = carve(dense, head=head, num_active=4, output_scale=1.0)
    teacher, tokenizer = load_dense(str(dense))
    spec = replace(spec, max_length=LONGEST)
    manifest = export_model(student, teacher if "dense" in plans else None, tokenizer, spec, out, plans=plans)
    write_manifest(out, manifest)
    return student, manifest


def in_label_order(found: list[list[dict[str, Any]]], config: Any) -> np.ndarray:
    """The scores of a pipeline, [N, labels]."""
    by_label = [{row["label"]: row["score"] for row in rows} for rows in found]
    return np.array([[rows[config.id2label[index]] for index in range(config.num_labels)] for rows in by_label])


@pytest.mark.parametrize(
    ("kind", "problem", "plans"),
    [
        ("bert", "single_label", ("sorted",)),
        ("bert", "multi_label", ("sorted",)),
        ("bert", "regression", ("sorted",)),
        ("bert", "one_label", ("dense", "sorted", "ov-sorted")),
        ("roberta", "one_label", ("sorted",)),
        ("distilbert", "regression", ("sorted",)),
        ("electra", "single_label", ("sorted",)),
        ("deberta-v2", "multi_label", ("sorted",)),
        ("llama", "single_label", ("sorted",)),
    ],
)
def test_scores_of_texts_and_pairs_are_those_of_the_pipeline(kind, problem, plans, tmp_path):
    dense = make(tmp_path / "dense", kind, **of_problem(problem))
    student, manifest = exported(dense, tmp_path / "out", plans=plans)
    assert manifest["spec"]["problem"] == problem and set(manifest["plans"]) == set(plans)
    pipe = tf.pipeline("text-classification", str(dense), top_k=None)
    texts = in_label_order(pipe(TEXTS), student.config)
    pairs = in_label_order(pipe([{"text": a, "text_pair": b} for a, b in PAIRS]), student.config)
    assert np.ptp(texts[:, 0]) > 1e-3 and np.abs(pairs - texts).max() > 1e-3, "the scores must depend on the texts"

    tokenizer = tf.AutoTokenizer.from_pretrained(dense)
    for rows, expected in ((TEXTS, texts), (PAIRS, pairs)):
        given = (rows,) if rows is TEXTS else map(list, zip(*rows, strict=True))
        with torch.no_grad():
            logits = student(**tokenizer(*given, padding=True, return_tensors="pt")).logits
        np.testing.assert_allclose(PROBLEMS[problem].scores(logits.numpy()), expected, atol=1e-5)
        for plan in plans:
            export = ffn2moe.open_export(tmp_path / "out", plan, threads=1, precision="float32")
            np.testing.assert_allclose(export.scores(rows), expected, atol=1e-5)
            assert ("token_type_ids" in export.inputs) == (kind in ("bert", "electra"))


@pytest.mark.parametrize(
    ("labels", "activation", "problem"),
    [
        (1, torch.nn.Sigmoid(), "one_label"),
        (1, torch.nn.Identity(), "regression"),
        (3, torch.nn.Identity(), "single_label"),
    ],
)
def test_a_cross_encoder_ranks_pairs_as_sentence_transformers_does(labels, activation, problem, tmp_path):
    make(tmp_path / "bert", "bert", num_labels=labels)
    CrossEncoder(str(tmp_path / "bert"), activation_fn=activation).save_pretrained(str(tmp_path / "dense"))
    library = CrossEncoder(str(tmp_path / "dense"), device="cpu")
    student, _ = exported(tmp_path / "dense", tmp_path / "out")
    long = ("the old house " * 10, "a cat in the red garden " * 40)  # longer than the model reads
    pairs = [*PAIRS, long]
    library.max_seq_length = LONGEST
    export = ffn2moe.open_export(tmp_path / "out", "sorted", threads=1)
    assert problem_of(student.config) == export.problem.name == problem
    expected = library.predict(pairs).reshape(len(pairs), labels)
    # Identity over several labels is the library's default and gives logits.
    found = export.classify(pairs) if problem == "single_label" else export.scores(pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_entities_are_those_of_the_pipeline(kind, tmp_path):
    dense = make(tmp_path / "dense", kind, "TokenClassification", id2label=dict(enumerate(NER)))
    _, manifest = exported(dense, tmp_path / "out", "token_classification")
    assert manifest["spec"]["problem"] == "single_label"
    texts = [*TEXTS, "Ünknown 漢字 words stay"]
    export = ffn2moe.open_export(tmp_path / "out", "sorted", threads=1)
    for grouped, strategy in ((False, "none"), (True, "simple")):
        pipe = tf.pipeline("ner", str(dense), aggregation_strategy=strategy)
        expected = [pipe(text) for text in texts]
        found = export.entities(texts, grouped=grouped)
        assert sum(map(len, expected)) >= 5
        for mine, theirs in zip(found, expected, strict=True):
            assert [one | {"score": None} for one in mine] == [dict(one) | {"score": None} for one in theirs]
            np.testing.assert_allclose([one["score"] for one in mine], [one["score"] for one in theirs], atol=1e-5)
