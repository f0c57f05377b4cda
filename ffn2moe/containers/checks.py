"""Check that transformers loads a written container whole, and compare its logits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.containers.shards import DTYPES, Shards
from ffn2moe.containers.table import CONTAINERS


def audit(folder: str | Path) -> None:
    """Check that a folder holds exactly the tensors that its transformers class expects; else ValueError.

    Names, shapes and dtypes in the headers of the shards are compared with those that transformers itself would write
    for the class, built on the meta device. No weight is read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    if values.get("model_type") not in CONTAINERS:
        raise ValueError(f"{folder} is not a container: its model_type is {values.get('model_type')!r}")
    if "auto_map" in values:
        raise ValueError(f"{folder}/config.json names custom code (auto_map), which no container needs: remove it")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    expected = dict(model.state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    expected = revert_weight_conversion(model, expected)
    shards = Shards(folder)
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(shards))]
    problems += [f"{name} is not of this class" for name in sorted(set(shards) - set(expected))]
    for name in sorted(set(expected) & set(shards)):
        wanted = (tuple(expected[name].shape), DTYPES[expected[name].dtype])
        if shards.layout(name) != wanted:
            problems.append("{} is {} {}, not {} {}".format(name, *shards.layout(name), *wanted))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = set(json.loads(index.read_text())["weight_map"])
        problems += [f"{name} is not in {index.name}" for name in sorted(set(shards) - listed)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{folder} is not a whole {config.model_type} model: {'; '.join(problems[:3])}{more}")


@dataclass(frozen=True)
class Agreement:
    """How far the logits of two models are apart.

    The relative difference at a position is ``max |a - b| / max |b|`` over the vocabulary.
    """

    largest: float  # relative difference
    mean: float  # relative difference
    top1: float  # share of positions with the same most probable token
    positions: int


def compare(logits_BLV: Tensor, reference_BLV: Tensor) -> Agreement:
    """Return the agreement of two models' logits on the same tokens."""
    difference = (logits_BLV - reference_BLV).abs().amax(-1) / reference_BLV.abs().amax(-1)
    same = logits_BLV.argmax(-1) == reference_BLV.argmax(-1)
    return Agreement(difference.max().item(), difference.mean().item(), same.float().mean().item(), same.numel())


def open_native(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Open a container in plain transformers, in eval mode.

    ValueError if a tensor is missing, unexpected or of another shape.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(f"{folder} was loaded with {kind.replace('_', ' ')}: {sorted(report[kind])[:3]}")
    return model.eval()


@torch.no_grad()
def same_logits(student: nn.Module, folder: str | Path, ids_BL: Tensor) -> Agreement:
    """Compare a container's logits in plain transformers with those of its student, in float32.

    Where two router scores tie within rounding, the two models may choose different experts, and both are right. Such
    a position and those after it raise `largest`, but hardly `mean`.
    """
    return compare(open_native(folder)(ids_BL).logits, student.eval()(ids_BL).logits.float())
