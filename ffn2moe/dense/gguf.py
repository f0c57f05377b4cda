"""Read a GGUF file: what it holds, by its header alone, and its weights, dequantised by transformers.

transformers reads a GGUF file into a model, but not all of it: it skips metadata and tensors that it does not know.
Where what it skips changes the model, it is set here, or the file is refused by the name of what cannot be read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ffn2moe.dense.cache import save_as_floats
from ffn2moe.dense.config import auto_class, head_of
from ffn2moe.dense.families import FAMILIES
from ffn2moe.dense.weights import tied

# Keys of "ARCHITECTURE.*" that transformers does not read for every architecture -> the config's key (the first that
# the config has).
_SETTINGS = {
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
# Keys that say what the tensors' shapes or other keys say, or what no forward pass reads.
_HARMLESS = {
    *("vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.value_length", "rope.dimension_count"),
    *("attention.causal", "pooling_type", "tensor_data_layout", "rope.scaling.original_context_length"),
    *("rope.scaling.finetuned", "attention.key_length_swa", "attention.value_length_swa"),
}
# Names of rules that split text into words ("tokenizer.ggml.pre"), which llama.cpp defines as GPT-2's rule, and those
# that first split off each digit. transformers takes GPT-2's rule for each name that it does not know.
GPT2_RULE, SINGLE_DIGITS_RULE = "gpt-2", "smollm"  # the names that files are written with
_LIKE_GPT2 = {GPT2_RULE, "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"}
_SINGLE_DIGITS = {SINGLE_DIGITS_RULE, "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# Architectures that transformers opens, but of which no teacher can be made -> why.
_NO_TEACHERS = {
    **dict.fromkeys(("t5", "t5encoder", "umt5"), "whose kind of FFN and whose tokens transformers guesses"),
    "mamba": "which has no feed-forward layers",
}
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192  # of every LLaMA 3.x; its files hold the result only


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file by its header: nothing of its weights is read."""

    path: Path
    metadata: dict[str, Any]
    types: dict[str, str]  # tensor -> how its numbers are stored, e.g. "Q4_1"
    shapes: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def form(self) -> str:
        """How the file is quantised, as its author called it: "Q4_1", "Q4_K_M"."""
        from gguf import LlamaFileType

        number = self.metadata.get("general.file_type")
        if number in {item.value for item in LlamaFileType}:
            return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        sizes: dict[str, int] = {}
        for name, kind in self.types.items():
            sizes[kind] = sizes.get(kind, 0) + prod(self.shapes[name])
        return max(sizes, key=sizes.__getitem__)

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(map(prod, self.shapes.values()))


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file. ValueError, with the remedy, for one that cannot be read into a model."""
    _require_packages(path)
    from gguf import GGMLQuantizationType
    from transformers.integrations.gguf import reader

    try:
        blob = reader._mapped(str(path))
        metadata, count, place = reader._read_metadata(blob, str(path))
        tensors, _ = reader._read_tensor_table(blob, count, place)
    except Exception as error:  # a damaged file: struct, unicode and index errors
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or incomplete; fetch it again") from error
    names = {item.value: item.name for item in GGMLQuantizationType}
    found = GgufFile(
        path,
        metadata,
        {name: names.get(kind, str(kind)) for name, _, kind, _ in tensors},
        {name: tuple(shape) for name, shape, _, _ in tensors},
    )
    _require_readable(found)
    return found


def _require_packages(path: Path) -> None:
    from transformers.utils import is_accelerate_available
    from transformers.utils.import_utils import is_gguf_available

    if not (is_gguf_available() and is_accelerate_available()):
        raise ValueError(
            f"{path} is a GGUF file, and the packages that read it are not installed: pip install gguf accelerate"
        )


def _require_readable(file: GgufFile) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import _type_traits
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    parts = file.metadata.get("split.count", 1)
    if parts > 1:
        raise ValueError(
            f"{file.path} is one of {parts} files of a split GGUF model, which transformers cannot read: join them "
            "with `llama-gguf-split --merge FIRST_FILE whole.gguf`, and name whole.gguf"
        )
    # transformers spells some architectures as its own model types.
    known = {name.replace("_", "") for name in GGUF_SUPPORTED_ARCHITECTURES} - {"general", "tokenizer"}
    if file.architecture.replace("_", "").replace("-", "") not in known:
        raise ValueError(
            f"{file.path} is a GGUF file of the architecture {file.architecture!r}, which transformers cannot read "
            "from GGUF: name the model's folder of safetensors instead"
        )
    if file.architecture in _NO_TEACHERS:
        raise ValueError(
            f"{file.path} is a GGUF file of the architecture {file.architecture!r}, "
            f"{_NO_TEACHERS[file.architecture]}: name the model's folder of safetensors instead"
        )
    experts = file.metadata.get(f"{file.architecture}.expert_count", 0)
    if experts > 1:
        raise ValueError(
            f"{file.path} is a mixture of {experts} experts already ({file.architecture}), and only dense models are "
            "decomposed: name the dense model that it was made of"
        )
    able = {kind.name for kind in _type_traits} | {GGMLQuantizationType.F32.name, GGMLQuantizationType.F16.name}
    unable = sorted(set(file.types.values()) - able)
    if unable:
        raise ValueError(
            f"{file.path} holds tensors of the type {', '.join(unable)}, which the package gguf cannot dequantise: "
            "name the model's folder of safetensors, or a GGUF file of another type"
        )
    _require_tokenizer(file)


def _require_tokenizer(file: GgufFile) -> None:
    """ValueError where transformers would split texts otherwise than the model has learned."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or _own_tokenizer(file.path):
        return
    rule = file.metadata.get("tokenizer.ggml.pre", "default")
    if rule not in {*GGUF_PRE_TOKENIZER_SPLITS, *_LIKE_GPT2, *_SINGLE_DIGITS}:
        raise ValueError(
            f"{file.path} splits texts by the rule {rule!r}, which transformers does not know: put the model's "
            "tokenizer.json and tokenizer_config.json beside the file"
        )


def _own_tokenizer(path: Path) -> Path | None:
    """Return the folder of a GGUF file if a tokenizer lies beside it."""
    return path.parent if (path.parent / "tokenizer.json").is_file() else None


def gguf_config(file: GgufFile) -> Any:
    """Return the transformers config of a GGUF file. ValueError for metadata that no config can hold."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    for key, value in _unread(file).items():
        if key == "rope.freq_base":
            config.rope_parameters["rope_theta"] = value
            continue
        names = [name for name in _SETTINGS[key] if hasattr(config, name)]
        if names:
            setattr(config, names[0], value)
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = file.metadata[f"{file.architecture}.rope.scaling.factor"]
        config.rope_parameters |= {"rope_type": "linear", "factor": factor}
    if "rope_freqs.weight" in file.types:
        config.rope_parameters |= _llama3_rope(file, config)
    vars(config).pop("_model_name_or_path", None)  # the author's title of the file
    config.name_or_path = ""
    return config


def _unread(file: GgufFile) -> dict[str, Any]:
    """Return the metadata of the architecture that transformers does not read and that matters.

    ValueError for a key whose meaning is unknown here.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

    if file.architecture in GGUF_CONFIG_ARCHS:
        return {}
    prefix = f"{file.architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    read = {key for key, name in GGUF_CONFIG_MAPPING.get(file.architecture, {}).items() if name is not None}
    left = {key: value for key, value in own.items() if key not in read}
    found = {key: value for key, value in left.items() if key in _SETTINGS or key == "rope.freq_base"}
    scaling = own.get("rope.scaling.type", "none")
    harmless = _HARMLESS | ({"rope.scaling.type", "rope.scaling.factor"} if scaling in ("none", "linear") else set())
    strange = sorted(key for key in left if key not in found and key not in harmless)
    if strange:
        raise ValueError(
            f"{file.path} sets {', '.join(prefix + key for key in strange[:3])}, which transformers does not read from "
            "GGUF, so the model would compute something else: name its folder of safetensors instead"
        )
    return found


def _llama3_rope(file: GgufFile, config: Any) -> dict[str, Any]:
    """Return the scaling of rotary frequencies that LLaMA 3.x files hold as the tensor of its result."""
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    tensor = next(one for one in GGUFReader(file.path).tensors if one.name == "rope_freqs.weight")
    factors = torch.from_numpy(tensor.data.copy()).float()
    wanted = {
        "rope_type": "llama3",
        "factor": round(factors.max().item(), 3),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    plain, dimensions = config.rope_parameters["rope_theta"], 2 * len(factors)
    inverse = plain ** -(torch.arange(0, dimensions, 2).float() / dimensions)
    tried = type(config)(**config.to_dict() | {"rope_parameters": config.rope_parameters | wanted})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](tried, "cpu")
    if scaled.shape != inverse.shape or not torch.allclose(inverse / factors, scaled, rtol=1e-4):
        raise ValueError(
            f"{file.path} scales rotary frequencies (rope_freqs.weight) by another rule than LLaMA 3's, and "
            "transformers reads none from GGUF: name the model's folder of safetensors instead"
        )
    return wanted


def write_dequantised(file: GgufFile, out: Path) -> None:
    """Write the model of a GGUF file to the folder `out`: config, float32 weights as safetensors, and tokenizer."""
    with _parsed_once():
        config, auto = _config_and_class(file)
        model, report = auto.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        raise ValueError(f"{file.path} and transformers' {type(model).__name__} do not fit: {', '.join(wrong[:3])}")
    save_as_floats(model, out)
    _tokenizer(file).save_pretrained(out)


def write_headers(file: GgufFile, out: Path) -> None:
    """Write what `write_dequantised` writes without the weights: their file has its header, and takes no disk."""
    with _parsed_once():
        config, auto = _config_and_class(file)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    aliases, header, end = tied(model), {}, 0
    for name, tensor in model.state_dict().items():
        if name not in aliases:
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (out / "model.safetensors").open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + end)
    _tokenizer(file).save_pretrained(out)


def _config_and_class(file: GgufFile) -> tuple[Any, Any]:
    """Return the config of a file and the class that opens it. ValueError for a tensor that it does not read."""
    import transformers

    config = gguf_config(file)
    auto = getattr(transformers, auto_class(head_of(config), "text", FAMILIES.get(config.model_type)))
    _require_known_tensors(file, config, auto)
    return config, auto


def _tokenizer(file: GgufFile) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    own = _own_tokenizer(file.path)
    if own:
        return AutoTokenizer.from_pretrained(own, trust_remote_code=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    if (
        file.metadata.get("tokenizer.ggml.model") == "gpt2"
        and file.metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS
    ):
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    return tokenizer


def _require_known_tensors(file: GgufFile, config: Any, auto: Any) -> None:
    """ValueError for a tensor that transformers would leave out without a word."""
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if is_gguf_arch_supported(file.architecture):
        return  # their loader reports what it leaves out
    with torch.device("meta"):
        model = auto.from_config(config)
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())
    known = {*get_gguf_hf_weights_map(model, processor), "output.weight", "rope_freqs.weight"}
    strange = sorted(set(file.types) - known)
    if strange:
        raise ValueError(
            f"{file.path} holds tensors that transformers does not read from GGUF ({', '.join(strange[:3])}; "
            f"{len(strange)} in all): name the model's folder of safetensors instead"
        )


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a file and build its table of names once, not for the config and for every module again.

    On SmolLM2-135M the names alone are built 397 times.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    class Reader(gguf.GGUFReader):
        """Slice plain arrays: a slice of a memory map takes three times as long, and every token is one."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    once: dict[str, Callable[..., Any]] = {"GGUFReader": Reader, "get_tensor_name_map": gguf.get_tensor_name_map}
    before = {name: getattr(gguf, name) for name in once}
    for name, function in once.items():
        setattr(gguf, name, functools.cache(function))
    bar, modeling_gguf_pytorch_utils.tqdm = modeling_gguf_pytorch_utils.tqdm, lambda items, **_: items  # no bar
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar
        for name, function in before.items():
            setattr(gguf, name, function)
