"""At K = E, every kind of sentence-transformers folder gives the embeddings that the library gives.

`python -m pytest -s tests/test_sentence_folders.py` prints the largest difference of each way for each folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ffn2moe
from ffn2moe import cli
from ffn2moe.clients import sentence_transformers_folder
from ffn2moe.convert import Settings, convert
from ffn2moe.data.encode import encode
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.sentence_folder import copy_modules, keep_reading, read_sentence_folder
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.preflight.dense import Dense
from ffn2moe.runtime.engines.onnxruntime import session
from ffn2moe.sentence import Dense as DenseModule
from ffn2moe.sentence import LayerNorm, Normalize, SentenceModules
from tests.mixtures import flat_spec
from tests.sentence_folders import FOLDERS, TEXTS, save
from tests.texts import make_texts

TOLERANCE = 1e-5
# Also as the dense plan of the teacher: what is most unlike the others. To export a graph is most of a test's time.
DENSE_TOO = ("CLS and mean, Dense, LayerNorm, Dense with residual", "no Normalize", "decoder, last token")


class Graph:
    """What optimum gives sentence-transformers for the backend onnx: a graph that answers like a model."""

    def __init__(self, model_name_or_path: str, config: Any, **_: Any) -> None:
        self.config = config
        self.run = session(Path(model_name_or_path) / "onnx/model.onnx").run

    def forward(self, input_ids: Any, attention_mask: Any, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return BaseModelOutput(last_hidden_state=torch.from_numpy(self.run(["last_hidden_state"], inputs)[0]))


def opened(folder: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


def converted(folder: Path, out: Path, plans: Sequence[str] = ("sorted",)) -> Path:
    """Convert a folder at K = E and export it; return the export."""
    texts = out.with_name("texts.txt")
    texts.write_text("\n".join(text.replace("\n", " ") for text in make_texts(40)))
    settings = Settings(num_experts=4, num_active=4, distill_steps=0, corpus=str(texts), device="cpu", onnx=False)
    convert(str(folder), out, settings)
    teacher, tokenizer = load_dense(str(folder))
    student, spec = ffn2moe.load(out / "checkpoint"), ffn2moe.MoESpec.from_dict(_manifest(out)["spec"])
    export = out.with_name("export")
    write_manifest(export, export_model(student, teacher, tokenizer, spec, export, plans=plans))
    return export


def _manifest(path: Path) -> dict[str, Any]:
    from ffn2moe.runtime.files import read_manifest

    return read_manifest(path)


@pytest.mark.parametrize("name", FOLDERS)
def test_embeddings_are_those_of_the_library(name, tmp_path, monkeypatch):
    folder = save(name, tmp_path)
    theirs = opened(folder)
    plans = ("sorted", "dense") if name in DENSE_TOO else ("sorted",)
    export_folder = converted(folder, tmp_path / "converted", plans)
    spec = ffn2moe.MoESpec.from_dict(_manifest(export_folder)["spec"])
    assert spec.sentence is not None and spec.max_length == theirs.max_seq_length
    prompts = [None, *(prompt for prompt, text in theirs.prompts.items() if text)]

    student, (_, tokenizer) = ffn2moe.load(export_folder / "checkpoint"), load_dense(str(folder))
    ways = {"torch": lambda prompt_name: _in_torch(student, tokenizer, spec, prompt_name)}
    for plan in plans:
        ways[plan] = partial(_in_onnx, ffn2moe.open_export(export_folder, plan))
    monkeypatch.setattr("sentence_transformers.base.modules.transformer.load_onnx_model", Graph)
    ours = sentence_transformers_folder(export_folder, tmp_path / "folder", "sorted")
    both = sentence_transformers_folder(export_folder, tmp_path / "both", "sorted", torch=True)
    ways["folder, onnx"] = partial(_in_library, opened(ours, backend="onnx"))
    ways["folder, torch"] = partial(_in_library, opened(both, trust_remote_code=True))
    ways["both, onnx"] = partial(_in_library, opened(both, backend="onnx", trust_remote_code=True))

    found = {}
    for way, encoded in ways.items():
        differences = []
        for prompt_name in prompts:
            expected = theirs.encode(TEXTS, prompt_name=prompt_name)
            answer = encoded(prompt_name)
            assert answer.shape == expected.shape
            differences.append(np.abs(answer - expected).max() / max(1, expected.std()))
        found[way] = max(differences)
    print(f"\n{name}: " + ", ".join(f"{way} {difference:.1e}" for way, difference in found.items()))
    assert max(found.values()) <= TOLERANCE, found


def _in_torch(student: Any, tokenizer: Any, spec: Any, prompt_name: str | None) -> np.ndarray:
    prompt = spec.sentence.prompt(prompt_name=prompt_name)
    found: np.ndarray = encode(student, tokenizer, TEXTS, max_length=spec.max_length, prompt=prompt).numpy()
    return found


def _in_onnx(export: Any, prompt_name: str | None) -> np.ndarray:
    found: np.ndarray = export.encode(TEXTS, prompt_name=prompt_name)
    assert found.shape[1] == export.width
    return found


def _in_library(model: Any, prompt_name: str | None) -> np.ndarray:
    found: np.ndarray = model.encode(TEXTS, prompt_name=prompt_name)
    return found


# --- what cannot be carried -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("mean", tmp_path_factory.mktemp("plain"))


def changed(plain: Path, out: Path) -> Path:
    return Path(shutil.copytree(plain, out / "model"))


def edit(path: Path, change: Any) -> None:
    """Change the JSON in a file: a mapping is updated, a function is called with it."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | change if isinstance(change, dict) else change(content)))


def insert(kind: str) -> Callable[[list[Any]], list[Any]]:
    return lambda entries: [*entries[:2], {"idx": 2, "name": "more", "path": "2_More", "type": kind}, *entries[2:]]


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("modules.json", insert("sentence_transformers.models.CNN"), "module CNN, which cannot be carried"),
        ("modules.json", insert("sentence_transformers.models.LSTM"), "module LSTM"),
        ("modules.json", insert("sentence_transformers.models.WeightedLayerPooling"), "module WeightedLayerPooling"),
        ("modules.json", insert("sentence_transformers.models.Asym"), "module Router"),
        ("modules.json", insert("sentence_transformers.models.Later"), "models.Later.* does not know it"),
        ("modules.json", insert("modeling_theirs.Head"), "module modeling_theirs.Head.* never run"),
        ("modules.json", lambda all_: [all_[0] | {"type": "sentence_transformers.models.BoW"}, *all_[1:]], "BoW"),
        ("modules.json", lambda all_: all_[:1], "Transformer.* not pooled"),
        ("modules.json", lambda all_: [*all_[:2], *all_[1:]], "Pooling.* twice"),
        ("1_Pooling/config.json", {"include_prompt": False}, "Pooling.* leaves out the prompt"),
        ("sentence_bert_config.json", {"model_args": {"output_hidden_states": True}}, "model_args.* would be lost"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "Transformer.*fill-mask"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "is a SparseEncoder"),
        ("config_sentence_transformers.json", {"default_prompt_name": "nowhere"}, "default prompt 'nowhere' is none"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_its_name(plain, tmp_path, file, change, words):
    folder = changed(plain, tmp_path)
    edit(folder / file, change)
    with pytest.raises(ValueError, match=words):
        Dense(str(folder)).sentence  # noqa: B018


DENSE = {"in_features": 32, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}


def test_an_activation_of_a_dense_layer_that_is_code_or_has_weights_is_refused(plain, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Dense as Library

    folder = changed(plain, tmp_path)
    edit(folder / "modules.json", insert("sentence_transformers.models.Dense"))
    edit(folder / "2_More/config.json", DENSE | {"activation_function": "theirs.Swish"})
    with pytest.raises(ValueError, match=r"Dense.* its activation theirs\.Swish is code"):
        Dense(str(folder)).sentence  # noqa: B018
    Library(32, 8, activation_function=torch.nn.PReLU()).save(str(folder / "2_More"))
    with pytest.raises(ValueError, match=r"Dense.* its activation PReLU has weights"):
        Dense(str(folder)).sentence  # noqa: B018


def test_a_dense_layer_as_bin_is_refused_with_the_command_that_converts_it(plain, tmp_path):
    folder = changed(plain, tmp_path)
    edit(folder / "modules.json", insert("sentence_transformers.models.Dense"))
    edit(folder / "2_More/config.json", DENSE)
    weights = {"linear.weight": torch.rand(8, 32), "linear.bias": torch.zeros(8)}
    torch.save(weights, folder / "2_More/pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read here") as refusal:
        Dense(str(folder)).sentence  # noqa: B018
    exec(str(refusal.value).split('python -c "')[1].removesuffix('"'))
    model, _ = load_dense(f"{folder}-safetensors")
    assert torch.equal(model.sentence.chain[0].linear.weight, weights["linear.weight"])


def test_a_refusal_comes_before_the_work_and_is_short(plain, tmp_path, capsys):
    folder = changed(plain, tmp_path)
    edit(folder / "modules.json", insert("sentence_transformers.models.CNN"))
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--experts", "4"]) == 2
    said = capsys.readouterr()
    assert "CNN" in said.err and len(said.err.strip().splitlines()) <= 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_part_of_a_sentence_encoder_is_refused(plain, tmp_path):
    folder = changed(plain, tmp_path)
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"modules\.json is not: the folder is a part of a sentence encoder"):
        load_dense(str(folder))


# --- folders, prompts, older exports ----------------------------------------------------------------------------------


def test_the_subfolder_of_an_old_layout_is_pooled_as_its_parent_says(tmp_path):
    folder = save("old layout, max", tmp_path)
    for source in (folder, folder / "0_Transformer"):
        model, _ = load_dense(str(source))
        assert model.sentence.described.pooling == ("max",)


def test_a_language_model_in_a_sentence_encoder_gives_embeddings_unless_asked_otherwise(tmp_path):
    folder = save("decoder, last token", tmp_path)
    assert Dense(str(folder)).head == "embedding"
    assert Dense(str(folder), head="causal").sentence is None


def test_a_bare_folder_is_pooled_by_the_mean_at_unit_length(tiny_teacher):
    model, _ = load_dense(str(tiny_teacher))
    assert model.sentence.described == SentenceModules() and SentenceModules().unit


def test_a_copied_teacher_is_the_same_sentence_encoder(tmp_path):
    folder, copy = save("old layout, max", tmp_path), tmp_path / "copy"
    shutil.copytree(folder / "0_Transformer", copy)
    copy_modules(folder / "0_Transformer", copy)
    np.testing.assert_array_equal(opened(copy).encode(TEXTS), opened(folder).encode(TEXTS))
    (one, _), (other, _) = load_dense(str(folder)), load_dense(str(copy))
    assert one.sentence.described == other.sentence.described


@pytest.mark.parametrize("name", FOLDERS)
def test_a_kept_reading_is_what_the_library_reads(name, tmp_path, monkeypatch):
    folder = save(name, tmp_path)
    read = read_sentence_folder(folder)
    keep_reading(folder)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sentence_transformers", None)
        kept = read_sentence_folder(folder)
    assert read is not None and kept is not None
    assert (kept.described, kept.max_length) == (read.described, read.max_length)
    assert kept.tokenizer_options == read.tokenizer_options
    weights = kept.module.state_dict()
    assert weights.keys() == read.module.state_dict().keys()
    for key, value in read.module.state_dict().items():
        assert torch.equal(weights[key], value)


def test_a_reading_of_other_files_is_not_taken(tmp_path, monkeypatch):
    folder = save("old layout, max", tmp_path)
    keep_reading(folder)
    pooling = folder / "1_Pooling/config.json"
    pooling.write_text(pooling.read_text().replace("max", "mean"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="that library cannot be imported"):
        read_sentence_folder(folder)


def test_specs_of_version_0_1_0_are_read(tiny_teacher):
    spec = flat_spec()
    old = {name: value for name, value in spec.to_dict().items() if name != "sentence"}
    assert ffn2moe.MoESpec.from_dict(old | {"pooling": "mean"}) == spec
    cls = ffn2moe.MoESpec.from_dict(old | {"pooling": "cls"}).sentence
    assert cls == SentenceModules(pooling=("cls",)) == SentenceModules.of_spec({"pooling": "cls"})
    assert ffn2moe.MoESpec.from_dict(old | {"pooling": None}).sentence is None


def test_a_description_survives_json(tmp_path):
    described = SentenceModules(
        pooling=("cls", "mean"),
        modules=(DenseModule(64, 8, True, "Tanh", use_residual=True), LayerNorm(8), Normalize()),
        truncate_dim=4,
        prompts=(("query", "q: "), ("document", "")),
        default_prompt_name="query",
        similarity="dot",
    )
    assert SentenceModules.from_dict(json.loads(json.dumps(described.to_dict()))) == described
    assert described.embedding_width(32) == 4 and not described.unit
    assert described.describe() == (
        "cls and mean pooling, a dense layer (Tanh), a layer norm, not of unit length, behind the prompt 'q: '"
    )
    assert (described.prompt(), described.prompt(""), described.prompt(prompt_name="document")) == ("q: ", "", "")
    with pytest.raises(ValueError, match="no prompt 'passage'; this model has: query, document"):
        described.prompt(prompt_name="passage")
    with pytest.raises(ValueError, match="give one of them"):
        described.prompt("x", "query")
    with pytest.raises(ValueError, match="module 'CNN'"):
        SentenceModules.from_dict({"modules": [{"type": "CNN"}]})
