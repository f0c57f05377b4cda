"""A GGUF file is dequantised into the model that it holds, or refused by the name of what cannot be read."""

from __future__ import annotations

import sys

import gguf
import numpy as np
import pytest
import torch

from ffn2moe import cli
from ffn2moe.dense.gguf import open_gguf
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.plain import plain_folder
from ffn2moe.dense.source import resolve_source
from ffn2moe.dense.weights import weight_headers
from tests.gguf_files import llama, write_gguf

IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
def test_a_gguf_file_is_the_model_of_its_dequantised_weights(tmp_path, kind):
    model, stored = llama(), gguf.GGMLQuantizationType[kind]
    file = write_gguf(tmp_path / "tiny.gguf", model, stored)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), stored), stored)
            parameter.data = torch.from_numpy(rounded.copy())
    said: list[str] = []
    found, tokenizer = load_dense(str(file), say=said.append)
    assert any("dequantising tiny.gguf" in line and kind in line for line in said)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he th")["input_ids"]) == ["he", "Ġt", "h"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert not hasattr(found.config, "quantization_config")


def test_a_file_is_dequantised_once(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    load_dense(str(file))
    (folder,) = (tmp_path / "cache/ffn2moe/models").iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    load_dense(str(file))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_and_a_package_may_hold_a_gguf_file(tmp_path, monkeypatch):
    package = tmp_path / "site/tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    file = write_gguf(package / "tiny.gguf", llama())
    about = tmp_path / "site/tiny_model-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (about / "RECORD").write_text("tiny_model/__init__.py,,\ntiny_model/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    assert resolve_source("package:tiny-model") == ("package", file)
    assert resolve_source(str(package)) == ("gguf", file)
    assert resolve_source(str(file)) == ("gguf", file)
    write_gguf(package / "other.gguf", llama())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(other.gguf, tiny.gguf\): name the one"):
        resolve_source(str(package))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "rwkv7"}, "of the architecture 'rwkv7', which transformers cannot read"),
        ({"architecture": "t5"}, "of the architecture 't5', whose kind of FFN and whose tokens transformers guesses"),
        ({"architecture": "t5encoder"}, "name the model's folder of safetensors instead"),
        ({"architecture": "mamba"}, "which has no feed-forward layers"),
        ({"metadata": {"llama.expert_count": 8}}, r"is a mixture of 8 experts already \(llama\)"),
        ({"metadata": {"split.count": 3}}, "one of 3 files of a split GGUF model.*gguf-split --merge"),
        ({"metadata": {"llama.logit_scale": 4.0}}, r"sets llama\.logit_scale, which transformers does not read"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"sets llama\.rope\.scaling\.type"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}}, r"blk\.0\.ffn_gate_inp\.weight"),
        ({"tensors": {"counts": np.ones(4, np.int32)}}, "tensors of the type I32, which .* cannot dequantise"),
        ({"rule": "viking"}, r"splits texts by the rule 'viking'.*put the model's tokenizer\.json"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, change, message):
    file = write_gguf(tmp_path / "tiny.gguf", llama(), **change)
    with pytest.raises(ValueError, match=message):
        load_dense(str(file))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_files_that_are_no_gguf_and_damaged_ones_are_refused(tmp_path):
    other = tmp_path / "model.gguf"
    other.write_text("text")
    with pytest.raises(ValueError, match="is a file, but no GGUF file"):
        load_dense(str(other))
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ValueError, match="is damaged or incomplete; fetch it again"):
        load_dense(str(file))


def test_the_rotary_frequencies_of_llama_3_are_those_of_its_config(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = llama(rope_parameters=rope, head_dim=64)
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert round(float(factors.min()), 4) == 1 and round(float(factors.max()), 4) == 32
    file = write_gguf(
        tmp_path / "tiny.gguf",
        model,
        gguf.GGMLQuantizationType.F32,
        tensors={"rope_freqs.weight": factors},
    )
    found, _ = load_dense(str(file))
    ids = IDS.repeat(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model(ids).logits)
    file = write_gguf(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": factors[::-1].copy()})
    with pytest.raises(ValueError, match="by another rule than LLaMA 3's"):
        load_dense(str(file))


def test_digits_are_split_as_the_file_says(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama(), rule="smollm")
    _, tokenizer = load_dense(str(file))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("the 12")
    assert [piece for piece, _ in pieces] == ["the", "Ġ", "1", "2"]


def test_a_tokenizer_beside_the_file_is_taken(tmp_path):
    write_gguf(tmp_path / "first.gguf", llama(), rule="gpt-2")
    folder = tmp_path / "mine"
    folder.mkdir()
    _, tokenizer = load_dense(str(tmp_path / "first.gguf"))
    tokenizer.model_max_length = 99
    tokenizer.save_pretrained(folder)
    file = write_gguf(folder / "tiny.gguf", llama(), rule="viking")
    assert load_dense(str(file))[1].model_max_length == 99


def test_the_header_alone_tells_form_and_size(tmp_path):
    model = llama()
    file = open_gguf(write_gguf(tmp_path / "tiny.gguf", model, metadata={"general.file_type": 15}))
    assert file.form == "Q4_K_M" and file.parameters == sum(one.numel() for one in model.parameters())
    assert open_gguf(write_gguf(tmp_path / "bare.gguf", model)).form == "Q8_0"


def test_a_check_reads_the_header_of_a_file_and_finds_the_same(tmp_path, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", llama())
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join("he th the" + " he" * count for count in range(40)))
    arguments = ["check", "--corpus", str(corpus), "--experts", "4", "--active", "1", "--no-onnx", "--max-length", "16"]
    assert cli.main([*arguments, str(file)]) == 0
    said = capsys.readouterr().out
    assert "dequantising" not in said and "4 experts of 24" in said
    (headers,) = (tmp_path / "cache/ffn2moe/models").iterdir()
    assert (
        (headers / "model.safetensors").stat().st_blocks * 512 < 2**16 < (headers / "model.safetensors").stat().st_size
    )
    whole = plain_folder(str(file))
    assert whole != headers
    known = {name: (one.shape, one.dtype) for name, one in weight_headers(whole).items()}
    assert {name: (one.shape, one.dtype) for name, one in weight_headers(headers).items()} == known
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (headers / name).read_text() == (whole / name).read_text(), name
