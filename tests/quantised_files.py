"""Write tiny checkpoints of each quantised kind, with the names and dtypes of tensors that its library writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import make_tokenizer

WIDTH, FFN_WIDTH = 128, 256
I32, U8, I8, F8 = torch.int32, torch.uint8, torch.int8, torch.float8_e4m3fn
Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # end of a name -> dtype and shape


def plain(folder: Path) -> transformers.LlamaForCausalLM:
    """A random LLaMA of float32, saved in `folder` with a tokenizer."""
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len((folder / "vocab.txt").read_text().split()),
        hidden_size=WIDTH,
        intermediate_size=FFN_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def configure(folder: Path, settings: dict[str, Any] | None) -> None:
    """Set or remove the quantization_config of config.json."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.pop("quantization_config", None)
    file.write_text(json.dumps(config | ({"quantization_config": settings} if settings else {})))


def rewrite(folder: Path, convert: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Replace every weight of a linear map by what `convert` makes of it."""
    file, written = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        written |= convert(name, tensor) if "proj" in name else {name: tensor}
    save_file(written, file, {"format": "pt"})


def block_fp8(folder: Path, block: int = 128) -> dict[str, torch.Tensor]:
    """Quantise to 8-bit floats with a scale a block, as DeepSeek does; return the dequantised weights by name."""
    exact = {}

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        blocks = weight.reshape(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3)) / 448
        stored = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(F8)
        exact[name] = (stored.float().reshape(blocks.shape) * scale[:, None, :, None]).reshape(rows, columns)
        return {name: stored, f"{name}_scale_inv": scale}

    rewrite(folder, convert)
    configure(folder, {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"})
    return exact


def stored_as(folder: Path, parts: Callable[[int, int], Parts], settings: dict[str, Any] | None) -> None:
    """Replace the linear maps, each [rows, columns], by zeros in tensors of the given names, dtypes and shapes."""

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        start = name.removesuffix("weight")
        found = parts(*weight.shape)
        return {start + end: torch.zeros(shape, dtype=dtype) for end, (dtype, shape) in found.items()}

    rewrite(folder, convert)
    configure(folder, settings)


def _method(name: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": name, **more}


_F16, _F32 = torch.float16, torch.float32
# Kind -> (what config.json says, the tensors of a linear map [rows, columns]).
KINDS: dict[str, tuple[dict[str, Any] | None, Callable[[int, int], Parts]]] = {
    "GPTQ": (
        _method("gptq", bits=4, group_size=128),
        lambda r, c: {
            "qweight": (I32, (c // 8, r)),
            "qzeros": (I32, (c // 128, r // 8)),
            "scales": (_F16, (c // 128, r)),
            "g_idx": (I32, (c,)),
        },
    ),
    "AWQ": (
        _method("awq", bits=4, group_size=128, zero_point=True, version="gemm"),
        lambda r, c: {
            "qweight": (I32, (c, r // 8)),
            "qzeros": (I32, (c // 128, r // 8)),
            "scales": (_F16, (c // 128, r)),
        },
    ),
    "bitsandbytes 4-bit": (
        _method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        lambda r, c: {
            "weight": (U8, (r * c // 2, 1)),
            "weight.absmax": (_F32, (r * c // 64,)),
            "weight.quant_map": (_F32, (16,)),
            "weight.quant_state.bitsandbytes__nf4": (U8, (80,)),
        },
    ),
    "bitsandbytes 8-bit": (
        _method("bitsandbytes", load_in_8bit=True),
        lambda r, c: {"weight": (I8, (r, c)), "SCB": (_F32, (r,)), "weight_format": (U8, ())},
    ),
    "compressed-tensors": (
        _method("compressed-tensors", format="pack-quantized"),
        lambda r, c: {
            "weight_packed": (I32, (r, c // 8)),
            "weight_scale": (_F16, (r, c // 64)),
            "weight_shape": (torch.int64, (2,)),
        },
    ),
    "sparse compressed-tensors": (
        _method("compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}),
        lambda r, c: {"compressed": (_F16, (r, c // 2)), "bitmask": (U8, (r, c // 8)), "shape": (torch.int64, (2,))},
    ),
    "ModelOpt (FP8, NVFP4)": (
        _method("modelopt", quant_algo="NVFP4"),
        lambda r, c: {
            "weight": (U8, (r, c // 2)),
            "weight_scale": (F8, (r, c // 16)),
            "weight_scale_2": (_F32, ()),
            "input_scale": (_F32, ()),
        },
    ),
    "torchao": (
        _method("torchao", quant_type={"default": {"_type": "Int8WeightOnlyConfig"}}),
        lambda r, c: {"_weight_qdata": (I8, (r, c)), "_weight_scale": (_F32, (r, 1))},
    ),
    "quanto": (
        _method("quanto", weights="int8"),
        lambda r, c: {"weight._data": (I8, (r, c)), "weight._scale": (_F32, (r, 1))},
    ),
    "HQQ": (
        _method("hqq", quant_config={}),
        lambda r, c: {"W_q": (U8, (r * c // 128, 64)), "scale": (_F16, (1, 64)), "zero": (_F16, (1, 64))},
    ),
    "EETQ": (_method("eetq"), lambda r, c: {"weight": (I8, (c, r)), "weight_scales": (_F16, (r,))}),
    "AQLM": (
        _method("aqlm", in_group_size=8),
        lambda r, c: {
            "codes": (torch.int16, (r, c // 8, 1)),
            "codebooks": (_F16, (1, 256, 1, 8)),
            "scales": (_F16, (r, 1, 1, 1)),
        },
    ),
    "VPTQ": (
        _method("vptq", config_for_layers={}),
        lambda r, c: {"indices": (I32, (1, r, c // 64)), "centroids.weight": (_F16, (1, 2048))},
    ),
    "SpQR": (
        _method("spqr", bits=3),
        lambda r, c: {"dense_weights": (torch.int64, (r * c // 21,)), "row_offsets": (I32, (r + 1,))},
    ),
    "HIGGS": (
        _method("higgs", bits=4),
        lambda r, c: {"weight": (torch.int16, (r, c // 4)), "scales": (_F16, (r, c // 64)), "tables2": (_F16, (16, 2))},
    ),
    "FP-Quant": (
        _method("fp_quant"),
        lambda r, c: {"qweight": (U8, (r, c // 2)), "scales": (U8, (r, c // 32)), "dqweight": (_F16, (r, c))},
    ),
    "MLX": (
        _method("metal", bits=4),
        lambda r, c: {"weight": (I32, (r, c // 8)), "scales": (_F16, (r, c // 64)), "qbiases": (_F16, (r, c // 64))},
    ),
    "BitNet": (
        _method("bitnet"),
        lambda r, c: {"weight": (U8, (r // 4, c)), "weight_scale": (torch.bfloat16, (1,))},
    ),
    "FP8 with scales": (
        _method("fbgemm_fp8"),
        lambda r, c: {"weight": (F8, (r, c)), "weight_scale": (_F32, (r, 1))},
    ),
    "8-bit integers with scales": (None, lambda r, c: {"weight": (I8, (r, c)), "weight_scale": (_F32, (r, 1))}),
}
