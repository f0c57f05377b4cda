"""Weigh the neurons of a model from its shards: memory is bounded by one layer, and the weights outside.

Calibration tokens pass forward through the layers as in `ffn2moe.decompose.stream`. The loss is differentiated at the
last hidden states, and its gradient passes back through the layers, each read once more and computed again from the
hidden states before it, which wait on disk. What is found is the Fisher information of each FFN's output
(`ffn2moe.decompose.gradients`), and, where it is wanted, a width for each layer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.calls import LayerCall, after_layers, embed_tokens, run_layers
from ffn2moe.decompose.gradients import FISHER_TOKENS, drawn, first_parts
from ffn2moe.decompose.inputs import real_tokens
from ffn2moe.decompose.source import Source, layers_path, only_stack, skeleton
from ffn2moe.decompose.width_costs import COST_TOKENS, costs, moments_of
from ffn2moe.decompose.widths import with_widths
from ffn2moe.dense.families import Stack
from ffn2moe.dense.locate import read_ffn
from ffn2moe.progress import Track, untracked
from ffn2moe.spec import MoESpec


@dataclass
class _Shards:
    """A model without weights, and where they are read from."""

    model: Any
    source: Source
    layers: nn.ModuleList

    def load(self, index: int) -> nn.Module:
        """Read the weights of a layer."""
        layer, prefix = self.layers[index], f"{layers_path(self.model)}{index}."
        layer.load_state_dict({name: self.source.read(prefix + name) for name in layer.state_dict()}, assign=True)
        return layer.requires_grad_(False)

    def load_outside(self) -> None:
        """Read the weights outside the layers."""
        path, aliases = layers_path(self.model), self.source.aliases
        names = [name for name in self.model.state_dict() if not name.startswith(path)]
        tensors = {name: self.source.read(name) for name in names if name not in aliases}
        tensors |= {name: tensors[aliases[name]] for name in names if name in aliases}
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.requires_grad_(False)


@torch.no_grad()
def weigh(
    folder: str | Path,
    spec: MoESpec,
    batches: Sequence[Batch],
    out: str | Path,
    *,
    by_need: bool,
    seed: int,
    track: Track = untracked,
) -> MoESpec:
    """Write the Fisher information of the output of each FFN of the model in `folder` to the new folder `out`.

    `read_fisher` reads it. Return the spec; `by_need` gives each layer a width of its own, as `widths.by_need` does.
    Hidden states and moments wait beside `out`, which appears when it is whole. The errors are those of
    `stream.decompose`.
    """
    from safetensors.torch import load_file, save_file

    out = Path(out)
    model = skeleton(folder, spec.head)
    stack, layers = only_stack(model)
    shards = _Shards(model, Source(folder, model), layers)
    use_cache = getattr(model.config, "use_cache", None)
    model.config.use_cache = False
    small = first_parts(batches, max(COST_TOKENS, FISHER_TOKENS) if by_need else FISHER_TOKENS)
    few = len(first_parts(small, FISHER_TOKENS))  # that are differentiated
    calls = embed_tokens(model, shards.source, layers, small)
    hidden, costs_LN = calls.hidden, []
    fresh = out.with_name(f"{out.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as waiting:
        for index in track(range(len(layers)), len(layers), "recording activations"):
            layer = shards.load(index)
            kept = {f"hidden.{place}": states.contiguous() for place, states in enumerate(hidden[:few])}
            hidden, inputs = run_layers(layer, stack, small, hidden, [one[index] for one in calls.calls])
            if by_need:
                x_TD = torch.cat(inputs)[:COST_TOKENS]
                kept["moments"] = moments_of(read_ffn(model, index), x_TD) / len(x_TD)
            save_file(kept, Path(waiting) / str(index))
            layer.to("meta")
        gradients = _at_the_end(shards, small[:few], hidden[:few], spec, seed)
        del hidden
        for index in track(range(len(layers))[::-1], len(layers), "weighing neurons"):
            layer, found = shards.load(index), load_file(Path(waiting) / str(index))
            states = [found[f"hidden.{place}"] for place in range(few)]
            called = [one[index] for one in calls.calls[:few]]
            gradients, fisher_DD = _back(layer, stack, called, small[:few], states, gradients)
            save_file({"fisher_DD": fisher_DD}, _file(fresh, index))
            if by_need:
                costs_LN.append(costs(read_ffn(model, index), found["moments"], fisher_DD))
            layer.to("meta")
    model.config.use_cache = use_cache
    os.replace(fresh, out)
    return with_widths(spec, costs_LN[::-1]) if by_need else spec


def read_fisher(folder: Path, layer: int) -> Tensor:
    """Return the Fisher information of the output of one FFN, [D, D], of those that `weigh` wrote."""
    from safetensors.torch import load_file

    return load_file(_file(folder, layer))["fisher_DD"]


def _file(folder: Path, layer: int) -> Path:
    return folder / f"{layer}.safetensors"


def _at_the_end(
    shards: _Shards, batches: Sequence[Batch], hidden: Sequence[Tensor], spec: MoESpec, seed: int
) -> list[Tensor]:
    """Return the gradient of the loss at the hidden states after the last layer, for each batch."""
    model, generator, found = shards.model, torch.Generator().manual_seed(seed), []
    shards.load_outside()
    for batch, states in zip(batches, hidden, strict=True):
        leaf = states.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = after_layers(shards.layers, leaf, partial(drawn, model, batch, spec.head, generator))
            found.append(torch.autograd.grad(loss, leaf)[0])
    path = layers_path(model)
    outside = {name: one.to("meta") for name, one in model.state_dict().items() if not name.startswith(path)}
    model.load_state_dict(outside, strict=False, assign=True)
    return found


def _back(
    layer: nn.Module,
    stack: Stack,
    calls: Sequence[LayerCall],
    batches: Sequence[Batch],
    hidden: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Return the gradient at the hidden states before a layer, for each batch, and ``E[g g']`` of its FFN's output.

    `hidden` are the states before the layer, `gradients` those at the states after it.
    """
    probes: list[Tensor] = []

    def add_probe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        probes.append(torch.zeros_like(output, requires_grad=True))
        return output + probes[-1]

    before, moments, tokens = [], torch.zeros(()), 0
    hook = layer.get_submodule(stack.w_out).register_forward_hook(add_probe)
    try:
        for call, batch, states, gradient in zip(calls, batches, hidden, gradients, strict=True):
            leaf = states.detach().requires_grad_(True)
            with torch.enable_grad():
                after = call.run(layer, leaf)
            to_leaf, to_probe = torch.autograd.grad(after, [leaf, probes.pop()], gradient)
            before.append(to_leaf)
            g_TD = real_tokens(to_probe, batch, stack.layers)
            moments, tokens = moments + g_TD.T @ g_TD, tokens + len(g_TD)
    finally:
        hook.remove()
    return before, moments / tokens
