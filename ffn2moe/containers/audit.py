"""Prove that a written container is what transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.containers.shards import Shards
from ffn2moe.containers.table import CONTAINERS, DTYPES

# ---------------------------------------------------------------------------------------------------------------------
# Proofs


def audit(folder: str | Path) -> None:
    """ValueError unless the folder's files hold every tensor that the transformers class expects, and nothing else.

    Both ways, with shapes and dtypes, from the headers of the shards and from the class on the meta device: no weight
    is read. The expected names are those that transformers itself would write.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    folder = Path(folder)
    values = json.loads((folder / "config.json").read_text())
    if values.get("model_type") not in CONTAINERS:
        raise ValueError(f"{folder} is not a container: its model_type is {values.get('model_type')!r}")
    if "auto_map" in values:
        raise ValueError(f"{folder}/config.json asks for code of its own (auto_map), which no container needs")
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
    """How far the logits of two models are apart. The relative difference is that of each position, of its largest
    logit: ``max |a - b| / max |b|``."""

    largest: float  # of the relative differences
    mean: float
    top1: float  # share of positions with the same most probable token
    positions: int


def compare(logits_BLV: Tensor, reference_BLV: Tensor) -> Agreement:
    """The agreement of two models' logits on the same tokens."""
    difference = (logits_BLV - reference_BLV).abs().amax(-1) / reference_BLV.abs().amax(-1)
    same = logits_BLV.argmax(-1) == reference_BLV.argmax(-1)
    return Agreement(difference.max().item(), difference.mean().item(), same.float().mean().item(), same.numel())


def open_native(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A container in plain transformers, in eval mode. ValueError if a tensor is missing, left over or misshapen."""
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
    """How a container's logits in plain transformers agree with those of the student it was written from, float32.

    Where two scores tie within rounding, the two may choose different experts and both are right: a position that
    differs, and those after it, says so in `largest` but hardly in `mean`.
    """
    return compare(open_native(folder)(ids_BL).logits, student.eval()(ids_BL).logits.float())
