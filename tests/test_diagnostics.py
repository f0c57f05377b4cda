"""Diagnostics say what experts do, and how much they say of where a text is from."""

from __future__ import annotations

import json

import pytest
import torch

from ffn2moe.decompose import diagnostics
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.sentence import SentenceModules
from tasks import corpus, evaluate, prepare
from tests.texts import make_stage, make_texts, write_corpus

E = 4
SMALL = (
    "data.corpus=texts.jsonl",
    "data.folder=sets",
    "data.calibration_texts=60",
    "data.evaluation_pairs=30",
    "teacher.max_length=32",
)


def layer(teacher, *, shared: tuple[int, ...] = (), **settings) -> tuple[MoEFFN, object]:
    """The first FFN of a tiny teacher in E runs of neurons, chosen by a random router."""
    model, _ = load_dense(str(teacher))
    expert_of_neuron_F = torch.arange(64) % E
    expert_of_neuron_F[list(shared)] = -1
    spec = spec_of(
        model,
        head="embedding",
        num_experts=E,
        num_active=2,
        partition="contiguous",
        teacher="tiny",
        max_length=32,
        sentence=SentenceModules(),
        shared_width=len(shared),
        **settings,
    )
    neurons_EM = neurons_by_expert(expert_of_neuron_F, E, spec.expert_width)
    shared_S = shared_neurons(expert_of_neuron_F)
    moe = MoEFFN.from_experts(spec, slice_experts(read_ffn(model, 0), neurons_EM, shared_S), neurons_EM, 0, shared_S)
    torch.manual_seed(0)
    torch.nn.init.normal_(moe.router.weight)
    return moe.eval(), spec


def test_a_layers_row_holds_errors_and_a_load_that_sums_to_one(tiny_teacher):
    moe, _ = layer(tiny_teacher)
    row = diagnostics.of_layer(moe, torch.randn(200, 32))
    assert sum(row["load"]) == pytest.approx(1) and row["mean_active"] == 2
    assert row["captured_energy"] == pytest.approx(1 - row["router_error"] ** 2)
    assert row["gap"] == pytest.approx(row["router_error"] - row["oracle_error"]) and row["gap"] >= 0
    assert row["dead_experts"] == sum(share == 0 for share in row["load"])


def choice_of(experts: list[int]) -> Choice:
    return Choice(torch.tensor(experts).unsqueeze(1), None)


def test_agreement_is_one_where_each_domain_has_its_expert_and_none_where_all_use_all_alike():
    text_T = torch.arange(40) // 10
    domains = ["news", "code", "news", "code"]
    told = diagnostics.agreement(choice_of([0 if t // 10 % 2 else 3 for t in range(40)]), text_T, domains, E)
    assert told.tokens == pytest.approx(1) and told.texts == pytest.approx(1)
    assert told.load_CE == [[1, 0, 0, 0], [0, 0, 0, 1]], "code, then news"
    none = diagnostics.agreement(choice_of([t % 2 for t in range(40)]), text_T, domains, E)
    assert none.tokens == pytest.approx(0, abs=1e-6)


def test_agreement_counts_used_pairs_only():
    choice = Choice(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[True, False], [True, False]]))
    told = diagnostics.agreement(choice, torch.tensor([0, 1]), ["a", "b"], 2)
    assert told.load_CE == [[1, 0], [0, 1]]


def test_texts_of_one_domain_have_nothing_to_agree_with():
    with pytest.raises(ValueError, match=r"one domain, 'news'"):
        diagnostics.agreement(choice_of([0, 1]), torch.tensor([0, 0]), ["news", "code"], E)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, tiny_teacher):
    """What evaluation reads, with texts of two sources and a student with two budgets."""
    root = tmp_path_factory.mktemp("diagnostics")
    write_corpus(root / "texts.jsonl", make_texts(240))
    (root / "sets").mkdir()
    write_corpus(root / "sets/notes.jsonl", [f"news: {text.split(chr(10))[0]}" for text in make_texts(200, seed=3)])
    prepare.run(make_stage("prepare", root, f"teacher.source={tiny_teacher}", *SMALL))
    for name in ("routed", "distilled"):
        model, tokenizer = load_dense(str(root / "data/teacher"))
        layers = []
        for _ in range(2):
            moe, spec = layer(tiny_teacher, elastic=(1,))
            layers.append(moe)
        install_moe(model, layers)
        checkpoint.save(model, tokenizer, spec, root / "models" / name)
    return root


def test_every_text_that_is_prepared_says_where_it_is_from(workspace):
    for split in ("train", "calibration", "evaluation"):
        rows = corpus.read_jsonl(workspace / f"data/corpus/{split}.jsonl")
        assert {row["source"] for row in rows} == ({"texts"} if split == "evaluation" else {"texts", "notes"})
        assert all((row["source"] == "notes") == row["text"].startswith("news: ") for row in rows)


def test_evaluation_tells_agreement_and_the_quality_of_every_budget(workspace):
    evaluate.run(make_stage("evaluate", workspace, *SMALL))
    found = json.loads((workspace / "metrics/evaluate.json").read_text())
    assert set(found["agreement"]["texts"]) == {"notes", "texts"}
    assert [row["layer"] for row in found["agreement"]["layers"]] == [0, 1]
    assert all(0 <= row["tokens"] <= 1 and 0 <= row["texts"] <= 1 for row in found["agreement"]["layers"])
    assert all({"mean_active", "captured_energy"} <= set(row) for row in found["layers"])
    assert [row["num_active"] for row in found["budgets"]] == [2, 1]
    assert [row["active_ffn_share"] for row in found["budgets"]] == [0.5, 0.25]
    assert found["budgets"][0]["figure"] == found["student"]["retrieval"]["ndcg_at_10"]
    assert not any(name.startswith("student_") for name in found)
    assert found["layers"][0]["mean_active"] == 2, "the student is diagnosed with its own K"


def test_texts_of_one_source_leave_agreement_out_and_say_so(workspace, capsys, tmp_path):
    import shutil

    shutil.copytree(workspace, tmp_path / "alone")
    path = tmp_path / "alone/data/corpus/calibration.jsonl"
    corpus.write_jsonl(path, ({"text": row["text"], "source": "texts"} for row in corpus.read_jsonl(path)))
    evaluate.run(make_stage("evaluate", tmp_path / "alone", *SMALL))
    assert (
        "agreement of experts with the sources of texts is skipped: all texts are from texts" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "alone/metrics/evaluate.json").read_text())["agreement"] is None


def test_sources_take_turns_so_that_each_is_among_the_first_tokens(workspace, tmp_path, monkeypatch):
    """The calibration texts of SmolLM2 began with more than 8,192 tokens of one source, and the stage failed."""
    import shutil

    shutil.copytree(workspace, tmp_path / "sorted")
    path = tmp_path / "sorted/data/corpus/calibration.jsonl"
    rows = sorted(corpus.read_jsonl(path), key=lambda row: row["source"])
    assert evaluate.in_turn([row["source"] for row in rows])[:2] == [0, [row["source"] for row in rows].index("texts")]
    corpus.write_jsonl(path, iter(rows))
    monkeypatch.setattr(evaluate, "DIAGNOSED_TOKENS", 100)
    evaluate.run(make_stage("evaluate", tmp_path / "sorted", *SMALL))
    found = json.loads((tmp_path / "sorted/metrics/evaluate.json").read_text())["agreement"]["texts"]
    assert set(found) == {"notes", "texts"} and sum(found.values()) < len(rows)
