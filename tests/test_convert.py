"""One process makes of a dense model what the stages make of it: for every head, resumable, whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import ffn2moe
from ffn2moe import cli
from ffn2moe.conversion import distillation, write
from ffn2moe.conversion import images as image_data
from ffn2moe.conversion.settings import Settings, layers, width
from ffn2moe.convert import convert, judge
from ffn2moe.data.batches import in_order
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.layer import moe_layers
from ffn2moe.preflight import room
from ffn2moe.runtime.files import read_manifest
from tests.conftest import make_tiny_bert, make_tiny_classifier, make_tiny_llama, make_tiny_t5, make_tokenizer
from tests.test_families import IMAGE_TOWER, TEXT_TOWER, tiny
from tests.texts import make_texts, write_corpus

QUICK = Settings(
    num_experts=4,
    num_active=2,
    texts=60,
    max_length=16,
    calibration_tokens=200,
    distill_steps=3,
    onnx=False,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl", make_texts(80)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("llama") / "dense"))


def test_a_language_model_is_converted_without_any_data(llama, tmp_path):
    said: list[str] = []
    manifest = convert(llama, tmp_path / "out", QUICK, say=said.append)
    assert manifest == read_manifest(tmp_path / "out")
    quality = manifest["convert"]["quality"]
    assert set(quality) == {"routed", "distilled"}
    assert quality["distilled"]["divergence"] < quality["routed"]["divergence"]
    assert quality["distilled"]["perplexity"] > 0 and 0 < quality["distilled"]["agreement"] <= 1
    assert manifest["convert"]["data"]["corpus"] == "generated"
    assert manifest["container"]["folder"] == "mixtral" and any(
        "mixtral, because the model is a llama" in s for s in said
    )

    student = ffn2moe.load(tmp_path / "out/checkpoint")
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/mixtral").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/mixtral/tokenizer.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


def test_a_gated_language_model_gets_experts_for_clusters_of_tokens(llama, tmp_path):
    settings = replace(QUICK, num_active=1, distill_steps=None, distill_minutes=0)
    assert convert(llama, tmp_path / "out", settings)["container"]["folder"] == "mixtral"
    assert checkpoint.load_spec(tmp_path / "out/checkpoint").partition == "token_clusters"
    teacher, _ = load_dense(llama)
    student = ffn2moe.load(tmp_path / "out/checkpoint")
    for index, moe in enumerate(moe_layers(student)):
        neurons = moe.neurons.flatten()
        assert len(neurons.unique()) < len(neurons)
        assert torch.equal(moe.w_in.flatten(0, 1), read_ffn(teacher, index).w_in_FD[neurons])
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/mixtral").eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(llama, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(llama, tmp_path / name, replace(QUICK, seed=seed))
    first, again, other = ((tmp_path / name / "checkpoint/model.safetensors").read_bytes() for name in ("a", "b", "c"))
    assert first == again != other


class Stop(Exception):
    pass


@pytest.mark.parametrize("place", ["writing texts", "decomposing and routing layers", "distilling", "container"])
def test_a_conversion_that_was_stopped_goes_on_and_ends_the_same(place, llama, tmp_path, monkeypatch):
    convert(llama, tmp_path / "whole", QUICK)
    monkeypatch.setattr(distillation, "CHECKPOINT_SECONDS", -1)

    def stopping(items: Any, total: int, what: str) -> Any:
        for count, item in enumerate(items):
            yield item
            if what == place and count == (0 if total == 1 else 1):
                raise Stop

    def no_container(*args: Any, **options: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        if place == "container":
            patch.setattr(write.containers, "write", no_container)
        with pytest.raises(Stop):
            convert(llama, tmp_path / "out", QUICK, track=stopping)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob("*.json")) or place != "writing texts"

    seen: list[str] = []

    def watching(items: Any, total: int, what: str) -> Any:
        seen.extend([what] * (total > 0))
        return items

    said: list[str] = []
    convert(llama, tmp_path / "out", QUICK, track=watching, say=said.append)
    assert any("resuming from" in line for line in said)
    order = ["writing texts", "decomposing and routing layers", "distilling", "container"]
    for done in order[: order.index(place)]:
        assert done not in seen or done == "distilling"
    if place == "distilling":
        assert any("resuming at step 2" in line for line in said)
    for name in ("checkpoint", "mixtral"):
        one, two = ((tmp_path / root / name / "model.safetensors").read_bytes() for root in ("whole", "out"))
        assert one == two


def test_another_conversion_does_not_go_on_with_what_is_there(llama, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/fingerprint").write_text("of another")
    said: list[str] = []
    convert(llama, tmp_path / "out", QUICK, say=said.append)
    assert any("discarding" in line and "belongs to another conversion" in line for line in said)


def test_a_discarded_conversion_is_named_by_what_differs(llama, tmp_path):
    def stop(items: Any, total: int, what: str) -> Any:
        raise Stop

    for changes, difference in (({}, None), ({"seed": 1, "num_experts": 8}, "different --experts, --seed")):
        said: list[str] = []
        with pytest.raises(Stop):
            convert(llama, tmp_path / "out", replace(QUICK, **changes), say=said.append, track=stop)
        assert difference is None or any(difference in line for line in said)


def test_minutes_become_steps_that_are_said_and_the_trial_leaves_no_trace(llama, tmp_path, monkeypatch):
    said: list[str] = []
    settings = replace(QUICK, distill_steps=None, distill_minutes=1e-9)
    monkeypatch.setattr(distillation, "_steps", timed(distillation._steps))
    manifest = convert(llama, tmp_path / "timed", settings, say=said.append)
    assert manifest["convert"]["distillation"]["steps"] == 1
    assert any("1 of them fill" in line for line in said) and any("--distill-steps 1" in line for line in said)
    monkeypatch.undo()
    convert(llama, tmp_path / "fixed", replace(QUICK, distill_steps=1))
    one, two = ((tmp_path / name / "checkpoint/model.safetensors").read_bytes() for name in ("timed", "fixed"))
    assert one == two


def timed(steps: Any) -> Any:
    """`_steps`, after which nothing of the trial may be left."""

    def checked(task: Any, distiller: Any) -> int:
        before = {name: tensor.clone() for name, tensor in distiller.state().items()}
        count = steps(task, distiller)
        after = distiller.state()
        assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
        return count

    return checked


def test_without_distillation_the_experts_keep_the_dense_weights(llama, tmp_path):
    manifest = convert(llama, tmp_path / "out", replace(QUICK, distill_steps=None, distill_minutes=0))
    assert set(manifest["convert"]["quality"]) == {"routed"}
    teacher, _ = load_dense(llama)
    moe = moe_layers(checkpoint.load(tmp_path / "out/checkpoint"))[0]
    up_FD = teacher.model.layers[0].mlp.up_proj.weight
    present_EM = moe.neurons >= 0
    assert torch.equal(moe.w_in[present_EM], up_FD[moe.neurons[present_EM]])


def test_a_model_too_large_for_memory_is_written_a_layer_at_a_time(llama, tmp_path, monkeypatch):
    settings = replace(QUICK, distill_steps=0, shared_width=8, container="glm4_moe")
    convert(llama, tmp_path / "whole", settings)
    monkeypatch.setattr(room, "available_memory", lambda: 0)
    monkeypatch.setattr(checkpoint, "load", None)
    said: list[str] = []
    manifest = convert(llama, tmp_path / "out", settings, say=said.append)
    assert manifest["convert"]["quality"] == {} and any("is not measured" in line for line in said)
    one, two = ((tmp_path / name / "glm4_moe/model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == two
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "out/checkpoint").config.model_type == "llama"


@pytest.mark.parametrize(
    ("make", "head", "measure"),
    [
        (make_tiny_bert, "embedding", "cosine"),
        (make_tiny_classifier, "classification", "agreement"),
        (make_tiny_t5, "seq2seq", "agreement"),
    ],
)
def test_other_models_of_text_are_converted_from_a_corpus(make, head, measure, corpus, tmp_path):
    make(tmp_path / "dense")
    said: list[str] = []
    manifest = convert(str(tmp_path / "dense"), tmp_path / "out", replace(QUICK, corpus=corpus), say=said.append)
    assert manifest["spec"]["head"] == head and "container" not in manifest
    assert measure in manifest["convert"]["quality"]["distilled"]
    assert len(moe_layers(ffn2moe.load(tmp_path / "out/checkpoint"))) == (4 if head == "seq2seq" else 2)
    assert any("in memory" in line for line in said) == (head == "seq2seq")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(20):
        Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("case", ["vit", "vit as a classifier"])
def test_models_of_images_are_converted_from_a_folder_of_them(case, images, tmp_path):
    tiny(case).save_pretrained(tmp_path / "dense")
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "dense")
    settings = replace(QUICK, distill_steps=2, corpus=str(images))
    manifest = convert(str(tmp_path / "dense"), tmp_path / "out", settings)
    measure = "relative_error" if case == "vit" else "agreement"
    assert measure in manifest["convert"]["quality"]["distilled"]
    with pytest.raises(ValueError, match="reads images: name a folder"):
        convert(str(tmp_path / "dense"), tmp_path / "other", QUICK)


def test_a_model_of_two_towers_is_decomposed_and_routed(images, tmp_path, monkeypatch):
    make_tokenizer(tmp_path / "words")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "words", model_max_length=16)
    pixels = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    towers = {
        "text_config": TEXT_TOWER | {"vocab_size": len(words), "eos_token_id": words.sep_token_id},
        "vision_config": IMAGE_TOWER,
    }
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(**towers)).save_pretrained(tmp_path / "dense")
    transformers.CLIPProcessor(pixels, words).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(image_data, "docstrings", lambda track=None: ["a cat", "the red dog"])
    said: list[str] = []
    manifest = convert(str(tmp_path / "dense"), tmp_path / "out", replace(QUICK, corpus=str(images)), say=said.append)
    assert len(manifest["spec"]["stacks"]) == 2 and any("not distilled" in line for line in said)


def test_the_graphs_are_written_too_and_the_folder_is_an_export(llama, tmp_path):
    settings = replace(QUICK, onnx=True, distill_steps=0, texts=20)
    said: list[str] = []
    manifest = convert(llama, tmp_path / "out", settings, say=said.append)
    assert [*manifest["plans"]] == ["sorted"] and "plans: sorted" in said  # any ONNX runtime opens it
    assert ffn2moe.open_export(tmp_path / "out").plan == "sorted"
    manifest = convert(llama, tmp_path / "every", replace(settings, every_plan=True))
    assert {"dense", "sorted", "fused"} <= set(manifest["plans"])


def test_the_judge_finds_nothing_lost_where_nothing_is_lost(llama):
    teacher, _ = load_dense(llama)
    spec = spec_of(teacher, head="causal", num_experts=4, num_active=2, partition="random", teacher="", max_length=8)
    ids = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15]]
    batches = list(in_order("causal", ids, batch_texts=2))
    found = judge(teacher, teacher, batches, spec)
    assert found["divergence"] == pytest.approx(0, abs=1e-9) and found["agreement"] == 1
    nats = []
    for text in ids:
        logits = teacher(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        nats += logits.gather(-1, torch.tensor(text[1:])[:, None]).flatten().tolist()
    assert found["perplexity"] == found["teacher_perplexity"] == pytest.approx(np.exp(-np.mean(nats)), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 100}, "num_experts = 100 is more than the 48 neurons"),
        ({"num_active": 5}, "num_active must be between 1 and num_experts = 4"),
        ({"container": "abacus"}, "unknown container 'abacus'"),
        ({"container": "qwen3_moe"}, r"qwen3_moe cannot hold this model, because .*; .* can"),
        ({"container": "mixtral", "gate": "sigmoid"}, "mixtral weighs experts by softmax_topk, not by sigmoid"),
        ({"max_length": 65}, r"--max-length 65 is more than the 64 positions of"),
        ({"corpus": "nowhere.txt"}, "no file nowhere.txt"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_cause(settings, message, llama, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(llama, tmp_path / "out", replace(QUICK, **settings))
    assert not (tmp_path / "out").exists()


def test_only_a_language_model_writes_its_own_texts(tmp_path):
    make_tiny_bert(tmp_path / "dense")
    with pytest.raises(ValueError, match="head embedding, which writes no texts"):
        convert(str(tmp_path / "dense"), tmp_path / "out", replace(QUICK, corpus="generated"))


def test_the_command_converts_and_says_what_is_next(llama, tmp_path, capsys):
    arguments = [llama, str(tmp_path / "out"), "--experts", "4", "--active", "2", "--texts", "40", "--no-onnx"]
    arguments += ["--max-length", "16", "--distill-steps", "1", "--calibration-tokens", "100", "--shared", "8"]
    assert cli.main(["convert", *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("2 of 4 and a shared one", "perplexity", "ffn2moe.load", "next:", "transformers, vLLM"):
        assert words in shown, words
    assert cli.main(["convert", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and "exists: remove it" in printed.err and printed.err.count("\n") == 1


def test_a_killed_conversion_leaves_nothing_that_looks_whole(llama, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from ffn2moe.convert import convert\n"
        "from ffn2moe.conversion.settings import Settings\n"
        "def track(items, total, what):\n"
        "    for count, item in enumerate(items):\n"
        "        yield item\n"
        "        if what == 'distilling': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert({llama!r}, sys.argv[1], {QUICK!r}, track=track)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True)
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    convert(llama, tmp_path / "out", QUICK)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["convert"]["distillation"]["steps"] == 3


def test_fewer_layers_and_narrower_ffns_are_settings_of_a_conversion(llama, tmp_path):
    """Without experts the checkpoint is an ordinary LLaMA; with experts the container has fewer layers, too."""
    settings = replace(QUICK, keep_layers=(1,), ffn_width=0.5, num_experts=1, onnx=True)
    manifest = convert(llama, tmp_path / "dense", settings)
    assert list(manifest["plans"]) == ["student"] and "container" not in manifest
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense/checkpoint")
    assert len(plain.model.layers) == 1 and plain.config.intermediate_size == 24
    assert "".join(ffn2moe.open_export(tmp_path / "dense").generate("the", max_new_tokens=3))
    manifest = convert(llama, tmp_path / "mixed", replace(QUICK, keep_layers=1))
    folder = tmp_path / "mixed" / manifest["container"]["folder"]
    assert len(transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_layers": 3}, "between 1 and 2"),
        ({"ffn_width": 49}, "FFNs of the model have 48"),
        ({"num_experts": 1}, "--experts 1 is a student without experts"),
        ({"num_experts": 1, "keep_layers": 1, "container": "mixtral"}, "--container mixtral holds experts"),
    ],
)
def test_what_a_smaller_student_cannot_be_is_refused_before_any_work(llama, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        convert(llama, tmp_path / "out", replace(QUICK, **settings))
    assert not list(tmp_path.iterdir())


def test_layers_and_widths_are_read_from_the_command_line():
    assert [layers(text) for text in ("all", "4", "0,2,5")] == ["all", 4, (0, 2, 5)]
    assert [width(text) for text in ("full", "96", "0.5")] == ["full", 96, 0.5]
