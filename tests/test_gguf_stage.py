"""The stage `export` writes GGUF files where they are asked for, and a run that cannot is refused before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer, GenerationConfig

from ffn2moe.moe import checkpoint
from ffn2moe.planning.shipping import Shipment, Size
from ffn2moe.preflight.case import Case
from ffn2moe.preflight.checks import findings
from ffn2moe.preflight.request import Request
from tasks import export
from tasks.check import KEYS
from tasks.corpus import write_jsonl
from tasks.params import ParamsError, load_params
from tests.conftest import make_tiny_llama
from tests.gguf_students import VOCABULARY, byte_level, dense
from tests.test_containers import student_of
from tests.texts import PARAMS, make_stage, make_texts

SETTINGS = ("export.engines=[onnxruntime]", "export.parity_texts=4", "compute.threads=1", "evaluate.batch_texts=8")
SETTINGS += ("decompose.container=mixtral",)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    dense(folder, "llama")
    return folder


def workspace(root: Path, teacher: Path) -> Path:
    """What the stage `export` reads of a language model: its texts are token ids, its figure is the perplexity."""
    shutil.copytree(teacher, root / "data/teacher")
    tokenizer = byte_level()
    model, spec = student_of("mixtral", vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    model.generation_config = GenerationConfig.from_pretrained(teacher)
    checkpoint.save(model, tokenizer, spec, root / "models/distilled")
    (root / "metrics").mkdir()
    write_jsonl(root / "data/corpus/evaluation.jsonl", ({"ids": list(range(4 + row, 30 + row))} for row in range(20)))
    figures = {name: {"language": {"perplexity": 9.0}} for name in ("teacher", "student")}
    (root / "metrics/evaluate.json").write_text(json.dumps(figures))
    return root


def test_the_stage_writes_a_file_of_each_type_and_an_export_ships_them(teacher: Path, tmp_path: Path) -> None:
    root = workspace(tmp_path / "work", teacher)
    export.run(make_stage("export", root, *SETTINGS, "export.gguf=[f32, q8_0]"))
    folder = root / "models/exported"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["gguf"] == {"files": {"f32": "gguf/f32.gguf", "q8_0": "gguf/q8_0.gguf"}, "notes": []}
    reader = gguf.GGUFReader(folder / "gguf/q8_0.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.name"].contents() == "tiny, 2 of 4 experts"
    assert reader.fields["tokenizer.chat_template"].contents()
    plans = dict.fromkeys(manifest["plans"], True)
    shipped = Shipment(folder, plans)
    shipped.write(tmp_path / "shipped", ["sorted"], {})
    assert (tmp_path / "shipped/gguf/f32.gguf").is_file()
    size = shipped.size(["sorted"])
    assert size.gguf == sum(file.stat().st_size for file in (folder / "gguf").iterdir())
    assert size.export < sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) - size.gguf
    assert "GGUF files of" in str(size) and "GGUF" not in str(Size(1, 1, 1))


def test_a_run_that_can_have_no_file_is_refused(tmp_path: Path) -> None:
    for settings, message in (
        (["export.gguf=[q8_0]", "decompose.container=none"], r"decompose.container=auto, or export.gguf=\[\]"),
        (["export.gguf=[q8_0]", "teacher.head=embedding"], "is written of causal language models"),
        (["export.gguf=[q8]"], "unknown type 'q8'; did you mean 'q8_0'"),
    ):
        with pytest.raises(ParamsError, match=message):
            load_params(PARAMS, settings)
    assert load_params(
        PARAMS, ["export.gguf=[q4_0]", "decompose.num_experts=1", "decompose.keep_layers=4"]
    ).export.gguf == ("q4_0",)


def found(source: Path, tmp_path: Path, **more: object) -> dict[str, tuple[str, str]]:
    """What the checks find of a conversion: kind and text of each line."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(make_texts(40)))
    request = Request(
        source=str(source), called=KEYS, corpus=str(corpus), max_length=16, onnx=False, steps=1, disk=tmp_path, **more
    )
    return {one.check: (one.kind, one.text) for one in findings(Case(request))}


def test_the_checks_say_what_the_width_of_an_expert_means(tmp_path: Path) -> None:
    teacher = tmp_path / "model"
    dense(teacher, "llama", intermediate_size=64)
    asked = {"num_experts": 2, "num_active": 1, "gguf": ("q8_0",)}
    kind, text = found(teacher, tmp_path, **asked)["gguf"]
    assert kind == "ok" and text.startswith("32 neurons are whole blocks of every type that is written; not of")
    kind, text = found(teacher, tmp_path, **asked | {"num_experts": 8, "num_active": 2})["gguf"]
    assert kind == "ok" and "pad experts of 8 neurons to 32 with zeros" in text


def test_a_tokenizer_that_llama_cpp_cannot_run_is_told_at_once(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "model")
    kind, text = found(source, tmp_path, num_experts=4, num_active=1)["gguf"]
    assert kind == "warning" and "it is of the kind WordPiece" in text
    kind, text = found(source, tmp_path, num_experts=4, num_active=1, gguf=("q8_0",))["gguf"]
    assert kind == "refused" and text.startswith("export.gguf=['q8_0'], but its tokenizer cannot be carried")


def test_a_chat_template_and_each_end_token_reach_the_container(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "model")
    GenerationConfig(eos_token_id=[2, 0], bos_token_id=1).save_pretrained(tmp_path / "model")
    root = workspace(tmp_path / "work", tmp_path / "model")
    export.run(make_stage("export", root, *SETTINGS, "export.gguf=[f16]"))
    folder = root / "models/exported"
    assert json.loads((folder / "manifest.json").read_text())["model"]["eos_token_ids"] == [2, 0]
    for part in ("container", "tokenizer"):
        assert AutoTokenizer.from_pretrained(folder / part).chat_template
    for part in ("container", "checkpoint"):
        assert GenerationConfig.from_pretrained(folder / part).eos_token_id == [2, 0]
    fields = gguf.GGUFReader(folder / "gguf/f16.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")] == [2, 0]
