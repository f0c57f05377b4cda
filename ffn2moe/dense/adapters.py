"""Merge an adapter (LoRA and relatives) into the model that it belongs to, by the library peft."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

from ffn2moe.dense.cache import save_as_floats
from ffn2moe.dense.config import constructor_options

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of the names of an adapter's tensors
# What an adapter was trained for -> the transformers class of its model.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter in a folder, and the source of the model that it changes."""

    folder: Path
    base: str  # the folder itself where the model lies beside the adapter
    task: str | None

    @property
    def beside(self) -> bool:
        """Whether the model lies in the adapter's folder."""
        return self.base == str(self.folder)


def adapter_in(folder: Path) -> Adapter | None:
    """Return the adapter of a folder, or None. ValueError, with the remedy, for one that cannot be merged here."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}): fetch the folder again") from error
    if util.find_spec("peft") is None:
        raise ValueError(
            f"{folder} holds an adapter ({settings.get('peft_type')}), and the package that merges it into its model "
            "is not installed: pip install peft"
        )
    _require_mergeable(folder, str(settings.get("peft_type")))
    return Adapter(folder, _base(folder, settings), settings.get("task_type"))


def _require_mergeable(folder: Path, kind: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    tuners: dict[str, Any] = {str(key.value): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if not hasattr(tuners.get(kind), "merge_and_unload"):
        raise ValueError(
            f"{folder} holds an adapter of the kind {kind}, which is no change of weights and cannot be merged into a "
            f"model: remove {ADAPTER_CONFIG} to convert a model without it"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; only safetensors are read here: fetch it again, "
            f"or remove {ADAPTER_CONFIG} if the adapter is merged already"
        )


def _base(folder: Path, settings: dict[str, Any]) -> str:
    """Return the source of the model that an adapter changes: beside it, else as its config names it."""
    if (folder / "config.json").is_file() and any(folder.glob("model*.safetensors")):
        return str(folder)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{folder} holds an adapter that names no model (base_model_name_or_path in {ADAPTER_CONFIG}): write the "
            "folder of its model there"
        )
    return str(folder / base) if (folder / base).is_dir() else str(base)


def write_merged(adapter: Adapter, base: Path, out: Path) -> None:
    """Write the model in `base` with the adapter merged into it to the folder `out`, in float32.

    ValueError for an adapter whose tensors do not fit the model.
    """
    import transformers
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter.folder / ADAPTER_WEIGHTS, framework="pt") as file:
        held = set(file.keys())
    with _without_adapter(base) as alone:
        config = transformers.AutoConfig.from_pretrained(alone, trust_remote_code=False)
        written = (config.architectures or [None])[0]
        name = _CLASSES.get(str(adapter.task)) or (written if hasattr(transformers, str(written)) else "AutoModel")
        bare = name == "AutoModel" and not any(".pooler." in tensor for tensor in held)
        options = constructor_options(config, "embedding") if bare else {}
        model, report = getattr(transformers, name).from_pretrained(
            alone,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    lacking = sorted(set(report["missing_keys"]) - {tensor.removeprefix(_PREFIX) for tensor in held})
    if lacking:
        raise ValueError(_misfit(adapter, base, f"neither holds {', '.join(lacking[:3])}"))
    try:
        changed = PeftModel.from_pretrained(model, str(adapter.folder))
    except (RuntimeError, ValueError) as error:
        raise ValueError(_misfit(adapter, base, str(error).strip().splitlines()[0])) from error
    differing = sorted(held ^ set(get_peft_model_state_dict(changed)))
    if differing:
        raise ValueError(_misfit(adapter, base, ", ".join(differing[:3])))
    save_as_floats(changed.merge_and_unload(), out, **options)


@contextmanager
def _without_adapter(base: Path) -> Iterator[Path]:
    """Yield a folder with the files of a model and no adapter: transformers would load one that lies beside it."""
    if not (base / ADAPTER_CONFIG).is_file():
        yield base
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in base.absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(folder) / file.name).symlink_to(file)
        yield Path(folder)


def _misfit(adapter: Adapter, base: Path, why: str) -> str:
    return f"the adapter in {adapter.folder} does not fit the model in {base} ({why}): name the model it was trained on"
