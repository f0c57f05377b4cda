"""Record how a model calls its layers, so that each can run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.data.batches import Batch
from ffn2moe.decompose.inputs import real_tokens
from ffn2moe.decompose.source import NotStreamable, Source, layers_path
from ffn2moe.dense.families import Stack

RETURNED = (None, (), (None,))  # what layers return beside hidden states; None: a tensor alone, no tuple


@dataclass
class LayerCall:
    """How the model calls one layer on one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the hidden states after the layer."""
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Unusable(Exception):
    """The layers of this model return something else than was tried."""


def record_calls(model: Any, layers: nn.ModuleList, batch: Batch) -> tuple[Tensor, list[LayerCall]]:
    """Return the input of the first layer for a batch, and how the model calls each layer; no layer is computed.

    The weights outside the layers must be loaded. NotStreamable where the model does more between its layers than pass
    hidden states on.
    """
    for rest in RETURNED:
        try:
            return _record_calls(model, layers, batch, rest)
        except (_Unusable, TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise NotStreamable(
        f"{type(model).__name__} does more between its layers than pass hidden states on ({reason}), so it cannot be "
        "decomposed layer by layer: convert it in memory"
    )


def _record_calls(
    model: Any, layers: nn.ModuleList, batch: Batch, rest: tuple[None, ...] | None
) -> tuple[Tensor, list[LayerCall]]:
    seen: list[Tensor] = []
    calls: list[LayerCall] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if seen and hidden.shape != seen[0].shape:
            raise _Unusable("a layer got a tensor of another shape than the first one did")
        seen.append(hidden)
        calls.append(LayerCall(args[1:], kwargs))
        return hidden if rest is None else (hidden, *rest)

    with _replaced(layers, forward):
        model.base_model(**batch.inputs)
    if len(calls) != len(layers):
        raise _Unusable(f"{len(calls)} of {len(layers)} layers were called")
    return seen[0], calls


@contextmanager
def _replaced(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for each layer inside the context."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def after_layers(layers: nn.ModuleList, hidden: Tensor, run: Callable[[], Tensor]) -> Tensor:
    """Return what `run`, a call of the model, gives where `hidden` are the hidden states after the last layer.

    The weights outside the layers must be loaded. NotStreamable where the layers return something unknown.
    """
    for rest in RETURNED:
        try:
            with _replaced(layers, lambda *args, rest=rest, **kwargs: hidden if rest is None else (hidden, *rest)):
                return run()
        except (TypeError, IndexError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise NotStreamable(f"the output does not follow from the last layer's hidden states ({reason}): convert in memory")


@dataclass
class Calls:
    """The embedded calibration tokens, and how the model calls each layer, by batch."""

    hidden: list[Tensor]
    calls: list[list[LayerCall]]


def embed_tokens(model: Any, source: Source, layers: nn.ModuleList, batches: Sequence[Batch]) -> Calls:
    """Return the inputs of the first layer and the calls of all layers. Weights outside are read for it and dropped."""
    path, base = layers_path(model), model.base_model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    outer = [name for name in base.state_dict() if not f"{prefix}{name}".startswith(path)]
    embedding = model.get_input_embeddings().weight
    rows = torch.cat([batch.inputs["input_ids"].flatten() for batch in batches]).unique()
    tensors = {}
    for name in outer:
        needed = rows if dict(base.named_parameters()).get(name) is embedding else None
        tensors[name] = source.read(prefix + name, rows=needed)
    base.load_state_dict(tensors, strict=False, assign=True)
    found = Calls([], [])
    for batch in batches:
        hidden, calls = record_calls(model, layers, batch)
        found.hidden.append(hidden)
        found.calls.append(calls)
    base.load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()}, strict=False, assign=True)
    return found


def run_layers(
    layer: nn.Module, stack: Stack, batches: Sequence[Batch], hidden: Sequence[Tensor], calls: Sequence[LayerCall]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return, for each batch, the hidden states after a dense layer, and the inputs [T, D] of its FFN."""
    seen: list[Tensor] = []
    hook = layer.get_submodule(stack.install).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        after = [call.run(layer, states) for call, states in zip(calls, hidden, strict=True)]
    finally:
        hook.remove()
    return after, [real_tokens(x, batch, stack.layers) for x, batch in zip(seen, batches, strict=True)]
