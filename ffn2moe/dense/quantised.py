"""The table of quantised checkpoints: how each kind is recognised, by config.json or by its tensors, and what happens.

transformers reads the scales of a kind that config.json does not name into nothing: a wrong model without an error. So
a kind is also recognised by the names and dtypes of its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from ffn2moe.dense.weights import Header

FLOATS = ("F64", "F32", "F16", "BF16")
EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
FP8_BLOCK = (128, 128)  # rows and columns that share a scale, where config.json does not say


@dataclass(frozen=True)
class Quantisation:
    """A kind of quantised checkpoint. transformers dequantises it if `packages` are installed; None: not on a CPU."""

    name: str
    methods: tuple[str, ...]  # "quant_method" in config.json
    ends: tuple[str, ...] = ()  # a file with a tensor for each of these ends of names is of this kind ...
    dtype: str = ""  # ... if one of them stands beside a "weight" whose dtype begins so
    packages: tuple[str, ...] | None = None
    switch: bool = False  # whether transformers dequantises it while it loads, if config.json says "dequantize"
    bare: bool = False  # whether its tensors say all that transformers needs, without config.json

    def fits(self, headers: Mapping[str, Header]) -> bool:
        """Return whether the tensors are of this kind."""
        if not self.ends or not all(any(name.endswith(end) for name in headers) for end in self.ends):
            return False
        scaled = (f"{name.removesuffix(self.ends[0])}.weight" for name in headers if name.endswith(self.ends[0]))
        return not self.dtype or any(name in headers and headers[name].dtype.startswith(self.dtype) for name in scaled)

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that dequantise it and are not installed."""
        return tuple(name for name in self.packages or () if util.find_spec(name.replace("-", "_")) is None)


_BITSANDBYTES, _COMPRESSED = ("accelerate", "bitsandbytes"), ("accelerate", "compressed-tensors")
QUANTISATIONS = (  # of those that fit the tensors, the first counts
    Quantisation("block FP8", ("fp8",), (".weight_scale_inv",), packages=("accelerate",), switch=True, bare=True),
    Quantisation("MXFP8", ("mxfp8",), packages=("accelerate",), switch=True),
    Quantisation("GPTQ", ("gptq",), (".qweight", ".g_idx")),
    Quantisation("AWQ", ("awq",), (".qweight", ".qzeros")),
    Quantisation("bitsandbytes 4-bit", ("bitsandbytes_4bit",), (".weight.absmax",), packages=_BITSANDBYTES),
    Quantisation("bitsandbytes 8-bit", ("bitsandbytes_8bit",), (".SCB",), packages=_BITSANDBYTES),
    Quantisation("compressed-tensors", ("compressed-tensors",), (".weight_packed",), packages=_COMPRESSED, switch=True),
    Quantisation("sparse compressed-tensors", (), (".bitmask",)),
    Quantisation("ModelOpt (FP8, NVFP4)", ("modelopt", "nvfp4"), (".weight_scale_2",)),
    Quantisation("torchao", ("torchao",), ("._weight_qdata",)),
    Quantisation("quanto", ("quanto",), (".weight._data",)),
    Quantisation("HQQ", ("hqq",), (".W_q",)),
    Quantisation("EETQ", ("eetq",), (".weight_scales",)),
    Quantisation("AQLM", ("aqlm",), (".codebooks",)),
    Quantisation("VPTQ", ("vptq",), (".centroids.weight",)),
    Quantisation("SpQR", ("spqr",), (".dense_weights",)),
    Quantisation("HIGGS", ("higgs",), (".tables2",)),
    Quantisation("FP-Quant", ("fp_quant",), (".dqweight",)),
    Quantisation("MLX", ("metal",), (".qbiases",)),
    Quantisation("MXFP4", ("mxfp4",), ("_blocks", "_scales")),
    Quantisation("BitNet", ("bitnet",), (".weight_scale",), "U8"),
    Quantisation("FP8 with scales", ("fbgemm_fp8",), (".weight_scale",), "F8"),
    Quantisation("8-bit integers with scales", (), (".weight_scale",), "I8"),
    Quantisation("AutoRound", ("auto-round",)),
    Quantisation("Quark", ("quark",)),
    Quantisation("SINQ", ("sinq",)),
    Quantisation("FourOverSix", ("fouroversix",)),
    Quantisation("Gemma's integers", ("gemma",)),
)


def quantisation_of(folder: Path, headers: Mapping[str, Header]) -> Quantisation | None:
    """Return the kind of a quantised checkpoint, or None for plain floats. No weight is read.

    ValueError, by its name, for one that cannot be dequantised here, and for weights that are no floats.
    """
    try:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = {}  # who reads the config says what is wrong
    settings = written.get("quantization_config") or written.get("compression_config") or {}
    named = _named(settings)
    seen = next((kind for kind in QUANTISATIONS if kind.fits(headers)), None)
    odd = sorted(name for name, header in headers.items() if _is_odd(name, header))
    # Names of tensors that only one kind has say more than config.json; scales beside 8-bit weights say less.
    found = seen if named is None or (seen and seen.packages is None and not seen.dtype) else named
    if found is None and not odd and not settings:
        return None
    start = f"the weights of {folder} are quantised"
    if found is None:
        kind = str(settings["quant_method"]) if "quant_method" in settings else f"{headers[odd[0]].dtype} in {odd[0]}"
        raise ValueError(f"{start} ({kind}), in a way that is not known here: name the model that they were made of")
    if seen is None and not odd:
        raise ValueError(
            f"config.json of {folder} says that the weights are quantised ({found.name}), and the files hold plain "
            "floats: remove quantization_config from config.json"
        )
    if found.packages is None:
        raise ValueError(
            f"{start} ({found.name}), which transformers cannot dequantise on this machine: name the model that they "
            "were made of"
        )
    if not settings and not found.bare:
        raise ValueError(f"{start} ({found.name}), and config.json lacks its quantization_config: fetch it again")
    if found.missing:
        raise ValueError(
            f"{start} ({found.name}), and the packages that dequantise them are not installed: pip install "
            f"{' '.join(found.missing)}"
        )
    _require_whole_blocks(folder, tuple(settings.get("weight_block_size") or FP8_BLOCK), headers)
    return found


def _named(settings: Mapping[str, Any]) -> Quantisation | None:
    """Return the kind that config.json names."""
    method = str(settings.get("quant_method", ""))
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = f"bitsandbytes_{4 if settings.get('load_in_4bit') else 8}bit"
    return next((kind for kind in QUANTISATIONS if method in kind.methods), None)


def _is_odd(name: str, header: Header) -> bool:
    """Return whether a tensor is a matrix of something else than floats."""
    if header.dtype in EIGHT_BIT_FLOATS:
        return True
    return header.dtype not in FLOATS and len(header.shape) > 1 and name.endswith("weight")


def _require_whole_blocks(folder: Path, block: tuple[int, ...], headers: Mapping[str, Header]) -> None:
    """ValueError for FP8 weights with smaller blocks at an end: transformers takes all blocks to be of one size."""
    for name, header in headers.items():
        scale = headers.get(f"{name}_scale_inv")
        if scale is None or not len(scale.shape) == len(header.shape) == len(block):
            continue
        sizes = zip(header.shape, scale.shape, block, strict=True)
        if any(parts > 1 and length != parts * size for length, parts, size in sizes):
            raise ValueError(
                f"{name} in {folder} is {list(header.shape)} with {list(scale.shape)} scales of {list(block)} blocks, "
                "and transformers dequantises whole blocks only: name the model that it was made of"
            )
