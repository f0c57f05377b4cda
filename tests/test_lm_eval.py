"""The judges give the figures of lm-evaluation-harness, by the task files of docs/lm_eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffn2moe.judge import judge
from tests.test_judges import made_up, make_llama, write
from tests.texts import make_texts

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install .[eval]")
TASK_FILES = Path(__file__).parent.parent / "docs/lm_eval"


def test_both_answer_the_same_questions_alike(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)  # the task files name their questions by relative paths
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    make_llama(tmp_path / "model")
    texts = [text.split("\n")[0] for text in make_texts(150)]
    pairs = [{"good": text, "bad": " ".join(sorted(text.split())), "phenomenon": "order"} for text in texts]
    rows = [{"context": one.context, "endings": list(one.choices), "label": one.label} for one in made_up(200)]
    files = {"hellaswag": write(tmp_path, "hellaswag.jsonl", rows), "blimp": write(tmp_path, "blimp.jsonl", pairs)}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["hellaswag_local", "blimp_local"],
        task_manager=TaskManager(include_path=str(TASK_FILES), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )["results"]
    mine = judge(str(tmp_path / "model"), tasks=files, device="cpu")["tasks"]
    assert mine["hellaswag"]["questions"] == 200 and mine["blimp"]["questions"] == 150
    for task, figure, theirs in (
        ("hellaswag", "accuracy", "acc"),
        ("hellaswag", "accuracy_normalised", "acc_norm"),
        ("blimp", "accuracy", "acc"),
    ):
        value = found[f"{task}_local"][f"{theirs},none"]
        assert mine[task]["model"][figure]["value"] == pytest.approx(value, abs=1e-9), json.dumps(found, default=str)
