"""Load a dense teacher from a folder, a package or a hub, and refuse what is damaged."""

from __future__ import annotations

import json
import re
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.dense.families import FAMILIES, Family, constructor_options, head_of, supported
from ffn2moe.dense.locate import family_of, require_untied
from ffn2moe.spec import Head, Pooling


def resolve_source(source: str) -> tuple[str, Path | None]:
    """Kind of a teacher source ("package", "folder" or "hub") and its folder (None for a hub name).

    `package:NAME` is a model whose folder travels inside an installed Python package; a path that exists is a
    local folder; any other text is taken as a model hub's name. FileNotFoundError says what to do.
    """
    if source.startswith("package:"):
        name = source.removeprefix("package:")
        return "package", _packaged_model(name)
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise FileNotFoundError(f"the teacher folder {source} has no config.json: name a Hugging Face folder")
        return "folder", Path(source)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise FileNotFoundError(
            f"the teacher {source} does not exist: name a local Hugging Face folder, a hub name (owner/model) "
            "or a packaged model (package:NAME)"
        )
    return "hub", None


def _packaged_model(distribution: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the teacher package {distribution!r} is not installed: pip install {distribution}"
        ) from None
    roots = sorted({file.parts[0] for file in files if file.name == "__init__.py"})
    for root in roots:
        spec = util.find_spec(root)
        for location in (spec.submodule_search_locations or []) if spec else []:
            configs = sorted(Path(location).rglob("config.json"), key=lambda path: (len(path.parts), str(path)))
            for config in configs:
                if any(config.parent.glob("*.safetensors")):
                    return config.parent
    raise FileNotFoundError(f"the package {distribution!r} holds no model folder (config.json beside *.safetensors)")


def auto_class(head: Head, reads: str, family: Family | None) -> str:
    if head == "causal":
        return "AutoModelForCausalLM"
    if head == "seq2seq":
        return "AutoModelForSpeechSeq2Seq" if reads == "speech" else "AutoModelForSeq2SeqLM"
    if head == "classification":
        kind = {"text": "Sequence", "speech": "Audio"}.get(reads, "Image")
        return f"AutoModelFor{kind}Classification"
    if head == "embedding" and family is not None and "seq2seq" in family.heads:
        return "AutoModelForTextEncoding"  # the encoder alone
    return "AutoModel"


_AUTO_READER = {"text": "AutoTokenizer", "images": "AutoImageProcessor"}  # else AutoProcessor


def load_dense(source: str, revision: str | None = None, *, head: Head | None = None) -> tuple[Any, Any]:
    """A dense teacher, float32 and in eval mode, and what prepares its input, from any source of `resolve_source`.

    The second is a tokenizer, or the processor of a model that reads images or speech. Without `head` the
    checkpoint's config says what the model gives (`head_of`). Only safetensors weights are read and no remote code
    is run. Raises ValueError for an unsupported architecture, incomplete or non-finite weights, FileNotFoundError
    for a source that cannot be found.
    """
    import transformers
    from safetensors import SafetensorError

    kind, folder = resolve_source(source)
    where = str(folder) if folder else source
    options: dict[str, Any] = {"trust_remote_code": False}
    if kind == "hub":
        options["revision"] = revision
    try:
        config = _read_config(source, where, options)
        family = FAMILIES.get(config.model_type)
        head = head or head_of(config)
        if family is not None and head not in family.heads:
            raise ValueError(
                f"the teacher {source} is a {family.name} model, from which this package makes "
                f"{' or '.join(family.heads)}, not {head}"
            )
        reads = family.reads if family else "text" if hasattr(config, "vocab_size") else "images"
        if folder is not None:
            weight_files(folder)
        model, report = getattr(transformers, auto_class(head, reads, family)).from_pretrained(
            where,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **constructor_options(config, head),
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(source, error, "model.safetensors") from error
    try:
        reader = getattr(transformers, _AUTO_READER.get(reads, "AutoProcessor")).from_pretrained(where, **options)
    except OSError as error:
        raise _unreadable(source, error, "a tokenizer" if reads == "text" else "preprocessor_config.json") from error
    if report["missing_keys"]:
        raise ValueError(
            f"the teacher {source} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, ...), which would "
            "be random: the file is incomplete, or config.json belongs to another model"
        )
    require_finite(model, f"the teacher {source}")
    family_of(model)
    require_untied(model)
    return model.eval(), reader


def _unreadable(source: str, error: Exception, what: str) -> FileNotFoundError:
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"the teacher {source} cannot be read ({reason}): it must be a Hugging Face folder with config.json, "
        f"model.safetensors and {what}, or the name of one that can be reached"
    )


def _read_config(source: str, where: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    written, _ = PreTrainedConfig.get_config_dict(where, **options)
    model_type = written.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = "; the code that travels with it is never run" if "auto_map" in written else ""
        raise ValueError(
            f"the teacher {source} is a {model_type!r} model, which is not supported; supported are: {supported()} "
            f"(transformers itself does not know it{code})"
        )
    return AutoConfig.from_pretrained(where, **options)


def weight_files(folder: str | Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder, by the tensor's name; only the files' headers are read.

    FileNotFoundError for a missing file. ValueError for a tensor that the index promises and its file lacks, and for
    one that stands in two files, of which one copy would be lost without a word.
    """
    from safetensors import safe_open

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        promised: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(promised.values()))
    else:
        promised, shards = {}, ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        named = f", which {index.name} names," if promised else ""
        raise FileNotFoundError(
            f"{', '.join(missing[:3])}{named} is not in {folder} ({len(missing)} of {len(shards)} files are missing)"
        )
    found: dict[str, Path] = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            if name in found:
                raise ValueError(
                    f"the tensor {name} stands in two files of {folder}, {found[name].name} and {shard}: one of them "
                    "belongs to another checkpoint; fetch the folder again"
                )
            found[name] = folder / shard
    lost = [name for name, shard in promised.items() if name not in found or found[name].name != shard]
    if lost:
        raise ValueError(
            f"{promised[lost[0]]} in {folder} lacks {', '.join(lost[:3])}, which {index.name} says it holds "
            f"({len(lost)} tensors in all): fetch the folder again"
        )
    return found


def pooling_of(folder: str | Path) -> Pooling:
    """How a teacher's authors pool its tokens: what a sentence-transformers folder says, else the mean.

    ValueError for a pooling that is neither the mean nor the first token.
    """
    path = Path(folder) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    modes = sorted(key for key, on in json.loads(path.read_text()).items() if key.startswith("pooling_mode") and on)
    known: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in known:
        raise ValueError(
            f"{path} asks for {modes}, which is not supported; supported are {sorted(known)}, one at a time"
        )
    return known[modes[0]]


def require_finite(model: nn.Module, what: str) -> None:
    """ValueError naming the first tensor of `model` that holds a NaN or an infinity."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{what} has NaN or infinite values in {name}: the weights are damaged, fetch them again")


def require_representable(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
    """ValueError if a value of the tensor called `what` is beyond the range of `dtype`, in which it is to be kept."""
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    if largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{what} holds {largest:.3g}, more than the {torch.finfo(dtype).max:.3g} that {dtype} can: "
            "keep the model in bfloat16 or float32"
        )
