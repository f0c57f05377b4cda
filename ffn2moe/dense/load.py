"""Load a dense teacher from a folder, a package or a hub, and refuse a damaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ffn2moe.choices import HEADS
from ffn2moe.dense.config import auto_class, constructor_options, head_of
from ffn2moe.dense.cross_encoder import declare_activation
from ffn2moe.dense.families import FAMILIES
from ffn2moe.dense.locate import family_of, require_untied
from ffn2moe.dense.plain import plain_folder
from ffn2moe.dense.sentence import attach
from ffn2moe.dense.sentence_folder import default_modules, read_sentence_folder
from ffn2moe.dense.tensors import explain, match
from ffn2moe.dense.weights import require_finite, weight_headers
from ffn2moe.literals import Reads
from ffn2moe.progress import Say, silent

_AUTO_READER = {"text": "AutoTokenizer", "images": "AutoImageProcessor"}  # else AutoProcessor


def load_dense(
    source: str, revision: str | None = None, *, head: str | None = None, say: Say = silent
) -> tuple[Any, Any]:
    """Return a dense teacher, float32 and in eval mode, and its tokenizer, from any source of `resolve_source`.

    For a model that reads images or speech the second is its processor. Without `head` the checkpoint's config says
    what the model gives (`head_of`). Only safetensors and GGUF weights are read and no remote code is run; `say` is
    told what is dequantised. ValueError for an unsupported architecture and for incomplete or non-finite weights,
    FileNotFoundError for a source that cannot be found.
    """
    from safetensors import SafetensorError

    folder = plain_folder(source, revision, say=say)
    try:
        config = read_config(source, folder)
        family = FAMILIES.get(config.model_type)
        head = HEADS.require(head or head_of(config, folder))
        if family is not None and head not in family.heads:
            raise ValueError(
                f"the teacher {source} is a {family.name} model, from which this package makes "
                f"{' or '.join(family.heads)}, not {head}"
            )
        reads: Reads = family.reads if family else "text" if hasattr(config, "vocab_size") else "images"
        encoder = read_sentence_folder(folder) if head == "embedding" else None
        name = auto_class(head, reads, family)
        if family is not None:
            _match_headers(folder, name, config, head, say)
        model = _read_model(source, folder, name, config, head)
    except (OSError, SafetensorError) as error:
        raise _unreadable(source, error, "model.safetensors") from error
    reader = _read_reader(source, folder, reads, encoder.tokenizer_options if encoder else {})
    if head == "embedding":
        attach(model, encoder.module if encoder else default_modules(config))
        reader = encoder.prepare(reader) if encoder else reader
    require_finite(model, f"the teacher {source}")
    family_of(model)
    require_untied(model)
    return model.eval(), reader


def _match_headers(folder: Path, name: str, config: Any, head: str, say: Say) -> None:
    """Say which tensors the model does not read; ValueError, before one is read, where files and model do not fit."""
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, name).from_config(config, **constructor_options(config, head))
    left_out = explain(folder, model, match(folder, weight_headers(folder), model).left)
    if left_out:
        say(left_out)


def _read_model(source: str, folder: Path, name: str, config: Any, head: str) -> Any:
    """Return the model of a transformers class, float32; ValueError where files and model do not fit."""
    import transformers

    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            **constructor_options(config, head),
        )
    except RuntimeError as error:  # tensors of other shapes
        raise ValueError(f"the weights of {source} do not fit its config.json: {error}") from error
    explain(folder, model, report["unexpected_keys"])
    if report["missing_keys"]:
        raise ValueError(
            f"the teacher {source} lacks weights ({', '.join(sorted(report['missing_keys'])[:3])}, ...), which would "
            "be random: the file is incomplete, or config.json belongs to another model"
        )
    return model


def _read_reader(source: str, folder: Path, reads: Reads, options: dict[str, Any]) -> Any:
    import transformers

    try:
        return getattr(transformers, _AUTO_READER.get(reads, "AutoProcessor")).from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except OSError as error:
        raise _unreadable(source, error, "a tokenizer" if reads == "text" else "preprocessor_config.json") from error


def _unreadable(source: str, error: Exception, what: str) -> FileNotFoundError:
    reason = str(error).strip().splitlines()[0]
    return FileNotFoundError(
        f"the teacher {source} cannot be read ({reason}): it must be a Hugging Face folder with config.json, "
        f"model.safetensors and {what}, or the name of one that can be reached"
    )


def read_config(source: str, folder: Path) -> Any:
    """Return the transformers config of a folder, which messages call `source`. ValueError where it cannot be read."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        written, _ = transformers.PreTrainedConfig.get_config_dict(folder)
        known = written.get("model_type") in CONFIG_MAPPING
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False) if known else None
    except Exception as error:  # a dozen kinds: no JSON, no object, values of the wrong type
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"config.json of {source} cannot be used ({reason}): fetch the folder again") from None
    if config is None:
        code = "; code that comes with a model is never run" if "auto_map" in written else ""
        raise ValueError(
            f"the teacher {source} is a {written.get('model_type')!r} model, which transformers "
            f"{transformers.__version__} does not know{code}; docs/families.md lists the {len(FAMILIES)} known types"
        )
    declare_activation(config, folder)
    return config
