"""Make a smaller dense model of a teacher: some of its layers, or FFNs with fewer neurons.

The smaller model is an ordinary model of the teacher's class, built from a config that says how many layers it has and
how wide their FFNs are. So transformers opens what is saved of it, without code of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ffn2moe.dense.blocks import write_block
from ffn2moe.dense.config import constructor_options
from ffn2moe.dense.families import Stack
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import family_of, stacks_of
from ffn2moe.dense.sentence import attach, modules_of
from ffn2moe.spec import MoESpec

Keep = str | int | Sequence[int]  # layers: "all", a number of them, or their indices
Width = str | int | float  # neurons of an FFN: "full", a number of them, or a share

# Keys of configs for the number of layers and for the width of an FFN. Which of them a model reads is not assumed: a
# model that is built with another value must have the wanted shape.
_LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "hidden_dim")
TOLERANCE = 1e-5  # largest difference between the smaller model and the teacher's own layers, relative to the output


@dataclass(frozen=True)
class Reduction:
    """What a smaller model keeps of the one stack of layers of a teacher."""

    layers: tuple[int, ...]  # ascending
    of_layers: int
    ffn_width: int  # neurons of each FFN
    of_ffn_width: int

    @property
    def drops_layers(self) -> bool:
        """Whether the smaller model has fewer layers."""
        return len(self.layers) < self.of_layers

    @property
    def drops_neurons(self) -> bool:
        """Whether the smaller model has narrower FFNs."""
        return self.ffn_width < self.of_ffn_width


def reduction(model: nn.Module, keep: Keep, width: Width) -> Reduction | None:
    """Return what is kept of a model; None where that is all of it.

    ValueError for layers and widths that the model does not have, and for a model of several stacks.
    """
    if keep == "all" and width == "full":
        return None
    _, layers = only_stack(model)
    wide = ffn_width_of(model)
    found = Reduction(kept_layers(keep, len(layers)), len(layers), kept_width(width, wide), wide)
    return found if found.drops_layers or found.drops_neurons else None


def kept_layers(keep: Keep, num_layers: int) -> tuple[int, ...]:
    """Return the layers to keep of `num_layers`, ascending: a number of them is spread evenly, ends included.

    ValueError for a layer that is not there, one that is named twice, and none at all.
    """
    if keep == "all":
        return tuple(range(num_layers))
    if isinstance(keep, int):
        if not 1 <= keep <= num_layers:
            raise ValueError(f"keep_layers = {keep} must be between 1 and {num_layers}, the layers of the model")
        if keep == 1:
            return (0,)
        return tuple(round(place * (num_layers - 1) / (keep - 1)) for place in range(keep))
    if isinstance(keep, str):
        raise ValueError(f"keep_layers = {keep!r} must be all, a number of layers, or their indices")
    layers = tuple(keep)
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"keep_layers = {list(layers)} must name at least one layer, each once and in order")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ValueError(
            f"keep_layers = {list(layers)} names a layer that is not there: the model has the layers 0 to "
            f"{num_layers - 1}"
        )
    return layers


def kept_width(width: Width, ffn_width: int) -> int:
    """Return the number of neurons to keep of `ffn_width`. ValueError for none and for more than there are."""
    if width == "full":
        return ffn_width
    if isinstance(width, str):
        raise ValueError(f"ffn_width = {width!r} must be full, a number of neurons, or a share between 0 and 1")
    wanted = round(width * ffn_width) if isinstance(width, float) else width
    if not 1 <= wanted <= ffn_width:
        raise ValueError(
            f"ffn_width = {width} is {wanted} neurons, and the FFNs of the model have {ffn_width}: give a number from "
            f"1 to {ffn_width}, or a share between 0 and 1"
        )
    return wanted


def only_stack(model: nn.Module) -> tuple[Stack, nn.ModuleList]:
    """Return the one stack of layers of a model that is to be made smaller. ValueError where it has several."""
    found = stacks_of(model)
    if len(found) != 1:
        raise ValueError(
            f"a {family_of(model).name} model has {len(found)} stacks of layers, and only a model of one is made "
            "smaller: keep all its layers and its full FFN width"
        )
    return found[0]


def ffn_width_of(model: nn.Module) -> int:
    """Return the width of the FFNs of a model of one stack; no weight is read."""
    stack, layers = only_stack(model)
    rows = layers[0].get_submodule(stack.w_out)
    return int(rows.weight.shape[0] if isinstance(rows, Conv1D) else rows.weight.shape[1])


def same_layers(teacher: Any, spec: MoESpec) -> Any:
    """Return a teacher with the layers that a student of this spec keeps: the teacher itself where these are all."""
    kept = spec.stacks[0].layers_kept
    return with_layers(teacher, kept, spec.head) if kept else teacher


@torch.no_grad()
def with_layers(model: Any, kept: Sequence[int], head: str, inputs: Mapping[str, Tensor] | None = None) -> Any:
    """Return a new model of the same class that has the layers `kept`, and every other weight, of `model`.

    With `inputs`, arguments of the model, it must give what the layers of `model` give one after the other. ValueError
    where it does not, or where the model's config does not set the number of layers.
    """
    stack, layers = only_stack(model)
    part = _part(model.config, stack)
    lists = {
        name: [value[index] for index in kept]
        for name, value in part.to_dict().items()
        if "layer" in name and isinstance(value, list) and len(value) == len(layers)
    }
    options = [{key: len(kept), **lists} for key in _keys(part, _LAYER_KEYS, (len(layers),))]
    smaller = _built(model, stack, options, head, lambda fresh: len(only_stack(fresh)[1]) == len(kept))
    with _only(model, stack, kept, lists):
        state = model.state_dict()
        expected = None if inputs is None else model(**inputs)[0]
    try:
        smaller.load_state_dict(state)
    except RuntimeError as error:
        raise _depends_on_place(model, kept, str(error).splitlines()[-1].strip()) from error
    if inputs is not None and expected is not None:
        difference = (smaller(**inputs)[0] - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise _depends_on_place(model, kept, f"the outputs differ by {difference:.1e}")
    return smaller


@torch.no_grad()
def with_ffns(model: Any, ffns: Sequence[DenseFFN], head: str) -> Any:
    """Return a new model of the same class with these FFNs, one a layer.

    Its config has the width of the widest one. ValueError where the model's config does not set it.
    """
    stack, layers = only_stack(model)
    part, before = _part(model.config, stack), ffn_width_of(model)
    widths = [ffn.ffn_width for ffn in ffns]
    options = [{key: max(widths)} for key in _keys(part, _WIDTH_KEYS, (before, None))]
    smaller = _built(model, stack, options, head, lambda fresh: ffn_width_of(fresh) == max(widths))
    set_ffn_widths(smaller, widths)
    ours = {
        id(parameter)
        for layer in layers
        for path in (stack.w_in, stack.w_out, stack.w_gate)
        if path
        for parameter in layer.get_submodule(path).parameters()
    }
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in ours}
    _, unexpected = smaller.load_state_dict(state, strict=False)
    assert not unexpected
    for block, ffn in zip(only_stack(smaller)[1], ffns, strict=True):
        write_block(block, stack, ffn)
    return smaller


def set_ffn_widths(model: nn.Module, widths: Sequence[int]) -> None:
    """Give the FFN of each layer of a model another width; the weights of those that change are 0 then."""
    stack, layers = only_stack(model)
    for block, width in zip(layers, widths, strict=True):
        _set_size(block.get_submodule(stack.w_in), (2 if stack.fused else 1) * width, outputs=True)
        _set_size(block.get_submodule(stack.w_out), width, outputs=False)
        if stack.w_gate:
            _set_size(block.get_submodule(stack.w_gate), width, outputs=True)


def _set_size(linear: nn.Module, size: int, *, outputs: bool) -> None:
    """Give a linear map so many outputs, or inputs."""
    transposed = isinstance(linear, Conv1D)  # it keeps [in, out]
    weight = linear.get_parameter("weight")
    axis = int(outputs == transposed)
    if weight.shape[axis] == size:
        return
    shape = [size if place == axis else count for place, count in enumerate(weight.shape)]
    linear.weight = nn.Parameter(weight.new_zeros(shape), weight.requires_grad)
    if outputs and linear.bias is not None:
        linear.bias = nn.Parameter(linear.get_parameter("bias").new_zeros(size), weight.requires_grad)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    setattr(linear, names[0] if outputs else names[1], size)


def _built(
    model: Any, stack: Stack, options: Sequence[Mapping[str, Any]], head: str, fits: Callable[[Any], bool]
) -> Any:
    """Return a model of the same class from a config with the first of these changes that fits; its weights are random.

    ValueError where none does.
    """
    reason = "its config has no key for it"
    for changes in options:
        values = model.config.to_dict()
        (values[stack.config] if stack.config else values).update(changes)
        try:
            config = type(model.config).from_dict(values)
            smaller = type(model)(config, **constructor_options(config, head)).to(torch.float32).eval()
        except (ValueError, TypeError, IndexError) as error:
            reason = str(error).strip().splitlines()[0]
            continue
        if hasattr(model, "probed_family"):
            smaller.probed_family = model.probed_family
        sentence = modules_of(model)
        if sentence is not None:
            attach(smaller, sentence)
        if fits(smaller):
            if model.can_generate():
                smaller.generation_config = model.generation_config
            return smaller
    raise ValueError(
        f"no smaller {family_of(model).name} model can be built ({reason}): keep all its layers and its full FFN width"
    )


def _part(config: Any, stack: Stack) -> Any:
    return getattr(config, stack.config, config) if stack.config else config


def _keys(part: Any, names: Sequence[str], wanted: Sequence[int | None]) -> list[str]:
    """Return those of the keys that have one of the wanted values, as config.json spells them."""
    spelled = dict.fromkeys(part.attribute_map.get(name, name) for name in names)
    values = part.to_dict()
    return [key for key in spelled if key in values and values[key] in wanted]


@contextmanager
def _only(model: Any, stack: Stack, kept: Sequence[int], lists: Mapping[str, Any]) -> Iterator[None]:
    """Leave only the layers `kept` in a model inside the context."""
    base, part = model.base_model, _part(model.config, stack)
    layers = base.get_submodule(stack.layers)
    values = {**lists, "use_cache": False}  # a cache has a place for each layer by its old index
    before = {key: part.__dict__[key] for key in values if key in part.__dict__}
    base.set_submodule(stack.layers, nn.ModuleList(layers[index] for index in kept))
    part.__dict__.update({key: values[key] for key in before})
    try:
        yield
    finally:
        base.set_submodule(stack.layers, layers)
        part.__dict__.update(before)


def _depends_on_place(model: Any, kept: Sequence[int], reason: str) -> ValueError:
    return ValueError(
        f"the layers {', '.join(map(str, kept))} of this {family_of(model).name} model compute something else when "
        f"they stand alone ({reason}): its layers depend on their place; keep all of them, or the first ones"
    )
