"""A factorised model on disk: a Hugging Face folder whose weights hold mixtures, and `ffn2moe.json`.

This is the only file of the package that knows names on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffn2moe.dense.families import constructor_options
from ffn2moe.dense.load import require_finite, weight_files
from ffn2moe.dense.locate import family_of, ffn_layers, ffn_paths, install
from ffn2moe.moe.layer import MoEFFN, connect
from ffn2moe.spec import MoESpec

SPEC_FILE = "ffn2moe.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
# What stands beside config and weights in a model's folder and goes with what is made of it: what opens its text or
# images, how it pools and generates, and what a licence asks to be passed on.
ASSETS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "additional_chat_templates", "generation_config.json", "1_Pooling"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def save(model: nn.Module, tokenizer: Any, spec: MoESpec, folder: str | Path) -> None:
    """Write a model whose FFNs are mixtures; `load` gives it back bit for bit.

    The bytes depend on the weights alone: same model, same file.
    """
    from safetensors.torch import save_file

    require_finite(model, "the model to be saved")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aliases = tied(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    held = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    save_file(held, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    describe(model, spec, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def describe(model: Any, spec: MoESpec, folder: Path) -> None:
    """Write what a saved model is: all but its weights and its tokenizer."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / SPEC_FILE).write_text(
        json.dumps({"format": FORMAT, "spec": spec.to_dict()}, indent=2, sort_keys=True) + "\n"
    )
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def tied(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are another's second name, with the first: only that one is on disk."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name:
            aliases[name] = other
    return aliases


def load_spec(folder: str | Path, active: int | None = None) -> MoESpec:
    """The spec of a saved model, or of its budget of `active` experts.

    FileNotFoundError or ValueError, with the remedy, for anything else.
    """
    path = Path(folder) / SPEC_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not an ffn2moe checkpoint: it has no {SPEC_FILE}; name the checkpoint folder of an export"
        )
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']} is not the {FORMAT} this version reads")
        spec = MoESpec.from_dict(content["spec"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or make the export again") from error
    return spec if active is None else spec.at(active)


def load(folder: str | Path, active: int | None = None) -> Any:
    """The saved model as an ordinary transformers model, float32, in eval mode; its FFNs are `MoEFFN`.

    Of an elastic model, `active` opens one budget alone; without it the model is at its own, and
    `ffn2moe.moe.layer.set_active` changes between them.
    The weights are in one file or in shards with an index. Every tensor of the files must be used and every tensor of
    the model must be in them.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    saved, spec = load_spec(folder), load_spec(folder, active)
    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(set(weight_files(folder).values())):
            tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {folder} cannot be read ({error}): copy them again, or make the export again"
        ) from error
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == spec.container:
        raise ValueError(
            f"{folder} is a native {spec.container} container: open it with transformers.AutoModelForCausalLM"
        )
    model = getattr(transformers, spec.model_class)(config, **constructor_options(config, spec.head))
    if family_of(model).name != spec.family or len(ffn_layers(model)) != spec.num_layers:
        raise ValueError(f"{folder}: config.json and {SPEC_FILE} describe different models")
    for index, name in enumerate(ffn_paths(model)):
        moe = MoEFFN(
            spec,
            index,
            b_in=f"{name}.b_in" in tensors,
            b_out=f"{name}.b_out" in tensors,
            b_gate=f"{name}.b_gate" in tensors,
        )
        install(model, index, moe)
    connect(model)
    if active is not None:
        tensors = _of_budget(tensors, saved, active)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    aliases = tied(model)
    missing = [name for name in missing if aliases.get(name) not in tensors]
    if missing or unexpected:
        raise ValueError(
            f"the weights of {folder} do not fit its {SPEC_FILE}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    require_finite(model, str(folder))
    return model.to(torch.float32).eval()


def _of_budget(tensors: dict[str, torch.Tensor], spec: MoESpec, active: int) -> dict[str, torch.Tensor]:
    """The tensors of an elastic model as one budget of it has them: that one's scale, and no other."""
    budget = f"elastic_scale.{active}"
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(".output_scale") and active != spec.num_active:
            continue
        if name.endswith(f".{budget}"):
            found[name.removesuffix(budget) + "output_scale"] = tensor
        elif ".elastic_scale." not in name:
            found[name] = tensor
    return found


def save_progress(path: str | Path, tensors: dict[str, torch.Tensor], *, step: int, fingerprint: str) -> None:
    """Write a training state in one piece: a reader finds the old file or the new one, never half of one.

    `fingerprint` names what the state belongs to; `load_progress` gives it to nobody else.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        fresh,
        metadata={"step": str(step), "fingerprint": fingerprint},
    )
    with open(fresh, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(fresh, path)


def load_progress(path: str | Path, *, fingerprint: str) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The step and tensors of a state of this very training, or None: no file, a damaged one, or another's."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None
            return int(metadata["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def copy_assets(source: str | Path, folder: str | Path) -> None:
    """Copy what stands beside config and weights in a model's folder, as it is."""
    for pattern in ASSETS:
        for asset in sorted(Path(source).glob(pattern)):
            if asset.is_dir():
                shutil.copytree(asset, Path(folder) / asset.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(asset, Path(folder) / asset.name)
