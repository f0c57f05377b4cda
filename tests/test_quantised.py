"""A quantised checkpoint is dequantised exactly, or refused by its name before a weight is read."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers

from ffn2moe.dense import quantised
from ffn2moe.dense.load import load_dense
from tests.quantised_files import F8, KINDS, block_fp8, configure, plain, stored_as

IDS = torch.arange(5, 40).unsqueeze(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "plain"
    plain(folder)
    return folder


@pytest.fixture
def folder(floats, tmp_path):
    shutil.copytree(floats, tmp_path / "model")
    return tmp_path / "model"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refusal(folder: Path) -> str:
    """Return the message that refuses a folder; no weight may be read before it, and nothing is written."""
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        load_dense(str(folder))
    assert time.monotonic() - start < 20
    assert not list(folder.parent.glob("cache/**/*.safetensors"))
    return str(error.value)


@pytest.fixture
def nothing_installed(monkeypatch):
    missing = {"bitsandbytes", "compressed_tensors"}
    real = quantised.util.find_spec
    monkeypatch.setattr(quantised.util, "find_spec", lambda name: None if name in missing else real(name))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_refused_by_its_name(folder, kind, nothing_installed):
    settings, parts = KINDS[kind]
    stored_as(folder, parts, settings)
    message = refusal(folder)
    assert f"are quantised ({kind})" in message
    assert "pip install" in message or "name the model that they were made of" in message


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_found_where_config_json_does_not_name_it(folder, kind):
    stored_as(folder, KINDS[kind][1], None)
    assert f"are quantised ({kind})" in refusal(folder)


def test_the_table_has_no_row_without_a_checkpoint_that_shows_it():
    shown = {*KINDS, "block FP8"}
    named_only = {row.name for row in quantised.QUANTISATIONS if not row.ends}
    assert {row.name for row in quantised.QUANTISATIONS} - named_only <= shown | {"MXFP4"}


@pytest.mark.parametrize("method", ["auto-round", "quark", "sinq", "fouroversix", "mxfp4", "a-method-of-tomorrow"])
def test_a_method_that_only_config_json_names_is_refused_by_its_name(folder, method):
    stored_as(folder, lambda rows, columns: {"codes": (torch.uint8, (rows, columns))}, {"quant_method": method})
    name = next((row.name for row in quantised.QUANTISATIONS if method in row.methods), method)
    assert name in refusal(folder) or "codes" in refusal(folder)


def test_eight_bit_floats_without_scales_are_refused(folder):
    stored_as(folder, lambda rows, columns: {"weight": (F8, (rows, columns))}, None)
    assert "quantised (F8_E4M3 in model.layers.0" in refusal(folder)


def test_plain_floats_that_config_json_calls_quantised_are_refused(folder):
    configure(folder, {"quant_method": "gptq", "bits": 4})
    assert "the files hold plain floats: remove quantization_config" in refusal(folder)


@pytest.mark.parametrize("config", ["as written", "without quantization_config"])
def test_block_fp8_is_dequantised_exactly(folder, config):
    exact = block_fp8(folder)
    if config != "as written":
        configure(folder, None)
    said: list[str] = []
    model, _ = load_dense(str(folder), say=said.append)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder.parent / "model", config=model.config)
    reference.load_state_dict(exact, strict=False)
    assert any("dequantising model (block FP8) to float32" in line for line in said)
    for name, weight in exact.items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=0, atol=0)
    assert not hasattr(model.config, "quantization_config")


def test_block_fp8_with_smaller_blocks_at_the_end_is_refused(folder):
    block_fp8(folder, 64)
    configure(folder, {"quant_method": "fp8", "weight_block_size": [96, 96]})
    assert "transformers dequantises whole blocks only" in refusal(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_dequantised_as_it_does_it_itself(folder, bits):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    made = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)
    made.save_pretrained(folder)
    model, _ = load_dense(str(folder))
    torch.testing.assert_close(logits(model), logits(made.dequantize(torch.float32)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["float-quantized", "int-quantized", "pack-quantized"])
def test_compressed_tensors_are_dequantised_as_the_library_does(folder, form):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.compressors import ModelCompressor

    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    before = logits(model)
    packed, kind = form == "pack-quantized", "float" if form == "float-quantized" else "int"
    grouping: dict = {"strategy": "group", "group_size": 64} if packed else {"strategy": "channel"}
    weights = quantization.QuantizationArgs(num_bits=4 if packed else 8, type=kind, **grouping)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    settings = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, settings)
    top = 448 if kind == "float" else 2 ** (weights.num_bits - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.reshape(*module.weight_scale.shape, -1)
            module.weight_scale.data = groups.abs().amax(-1) / top
            module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(folder)
    found, _ = load_dense(str(folder))
    library = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(library), rtol=0, atol=1e-5)
    assert 0 < (logits(found) - before).abs().max() < before.abs().max()


def test_other_formats_are_refused_by_name(folder):
    (folder / "model.safetensors").unlink()
    for file, name in (("tf_model.h5", "HDF5"), ("flax_model.msgpack", "msgpack"), ("onnx/model.onnx", "ONNX")):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"0")
        message = refusal(folder)
        assert name in message and "only safetensors and GGUF files are read" in message
        (folder / file).unlink()
