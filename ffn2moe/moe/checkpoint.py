"""Save and load a decomposed model: a Hugging Face folder whose weights hold mixtures, and `ffn2moe.json`.

Only this file of the package knows names on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffn2moe.dense.config import constructor_options, read_generation
from ffn2moe.dense.locate import family_of, ffn_layers, ffn_paths, install
from ffn2moe.dense.reduction import set_ffn_widths
from ffn2moe.dense.sentence import attach
from ffn2moe.dense.weights import require_finite, tied, weight_files
from ffn2moe.moe.layer import MoEFFN, connect
from ffn2moe.spec import MoESpec
from ffn2moe.table import UnknownName

SPEC_FILE = "ffn2moe.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = 1
# Files beside config and weights that are copied with a model: its tokenizer or image processor, how it
# generates, and the texts that a licence asks to pass on.
ASSETS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("tekken.json", "chat_template*", "additional_chat_templates", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def save(model: nn.Module, tokenizer: Any, spec: MoESpec, folder: str | Path) -> None:
    """Write a model whose FFNs are mixtures; `load` returns it bit for bit.

    The bytes depend on the weights alone: the same model gives the same file.
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
    """Write the config, the spec and the generation config of a model: everything except weights and tokenizer."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    if spec.is_ordinary:  # an ordinary folder names its class
        config["architectures"] = [spec.model_class]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / SPEC_FILE).write_text(
        json.dumps({"format": FORMAT, "spec": spec.to_dict()}, indent=2, sort_keys=True) + "\n"
    )
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_spec(folder: str | Path, active: int | None = None) -> MoESpec:
    """Return the spec of a saved model, or of its budget of `active` experts.

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
    except UnknownName as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or make the export again") from error
    return spec if active is None else spec.at(active)


def load(folder: str | Path, active: int | None = None) -> Any:
    """Return the saved model as an ordinary transformers model, float32, in eval mode.

    Its FFNs are `MoEFFN`, unless the student has no experts: then they are those of its class.
    For an elastic model, `active` opens one budget alone; without it the model uses its own K, and
    `ffn2moe.moe.layer.set_active` switches between its budgets. The weights are in one file or in shards with an index.
    ValueError unless every tensor of the files is in the model and every tensor of the model is in the files.
    """
    folder = Path(folder)
    saved, spec = load_spec(folder), load_spec(folder, active)
    tensors = _read_tensors(folder)
    model = _empty_model(folder, spec, tensors)
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


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(set(weight_files(folder).values())):
            tensors |= load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the weights of {folder} cannot be read ({error}): copy them again, or make the export again"
        ) from error
    return tensors


def _empty_model(folder: Path, spec: MoESpec, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the model of a folder's config with mixtures of the spec, before the tensors are loaded."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == spec.container:
        raise ValueError(
            f"{folder} is a native {spec.container} container: open it with transformers.AutoModelForCausalLM"
        )
    model = getattr(transformers, spec.model_class)(config, **constructor_options(config, spec.head))
    if family_of(model).name != spec.family or len(ffn_layers(model)) != spec.num_layers:
        raise ValueError(f"{folder}: config.json and {SPEC_FILE} describe different models")
    if spec.is_dense and spec.stacks[0].ffn_widths:
        set_ffn_widths(model, spec.stacks[0].ffn_widths)
    for index, name in enumerate(() if spec.is_dense else ffn_paths(model)):
        moe = MoEFFN(
            spec,
            index,
            b_in=f"{name}.b_in" in tensors,
            b_out=f"{name}.b_out" in tensors,
            b_gate=f"{name}.b_gate" in tensors,
        )
        install(model, index, moe)
    connect(model)
    read_generation(model, folder)
    if spec.sentence is not None:
        attach(model, spec.sentence)
    return model


def _of_budget(tensors: dict[str, torch.Tensor], spec: MoESpec, active: int) -> dict[str, torch.Tensor]:
    """Return the tensors of an elastic model at one budget: with the scale of that budget and no other."""
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
    """Write a training state atomically: a reader finds the old file or the new one, never a part of one.

    `fingerprint` names the training that the state belongs to; `load_progress` returns it for that training only.
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
    """Return step and tensors of a state of this training; None for no file, a damaged one, or another training's."""
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
    """Copy the files of `ASSETS` from a model's folder."""
    for pattern in ASSETS:
        for asset in sorted(Path(source).glob(pattern)):
            if asset.is_dir():
                shutil.copytree(asset, Path(folder) / asset.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(asset, Path(folder) / asset.name)
