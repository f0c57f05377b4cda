"""Find the FFNs of a model whose type has no row in `FAMILIES`, and prove the find.

The search knows only the structure of an FFN: in each layer of a stack, a linear map D -> F and one back (or a gated
pair). Two numbers prove a find: on random input the output of the second map equals that of an FFN with those weights,
and the model with all experts chosen (K = E) gives the outputs of the dense model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from ffn2moe.choices import HEADS, head_of_class
from ffn2moe.dense.blocks import activation_in, install_in_block, read_block, stacks_in
from ffn2moe.dense.families import Family, Stack, positions
from ffn2moe.dense.ffn import ACTIVATIONS, DenseFFN
from ffn2moe.literals import Reads

# Relative to the largest value of the output, in float32. The two activations that are most alike (gelu and its tanh
# form) differ by ten times as much at the preactivations of a trial.
FFN_TOLERANCE = 3e-5
MODEL_TOLERANCE = 1e-4
_PREACTIVATION = 2.0  # standard deviation
_READS: dict[str, Reads] = {"pixel_values": "images", "input_features": "speech"}
_EXPERTS = 3  # in a proof


def probe(model: nn.Module) -> Family:
    """Return the row of this model's type, found by structure and proven.

    ValueError, with the reason, if there is none. This registers nothing. The model must be dense and float32; it runs
    a few times on a few random tokens.
    """
    with _evaluation(model):
        trial = _Trial(model)
        trial.outputs()
        found = [stack for path, layers in _lists(model.base_model) if (stack := _find(trial, path, layers))]
        if not found:
            raise ValueError("no list of layers holds a linear map D -> F and one F -> D with F > D, or a gated pair")
        reads = _READS.get(model.main_input_name, "text")
        head = head_of_class(type(model).__name__) or ("embedding" if reads == "text" else "features")
        family = Family(
            name=model.config.model_type,
            stacks=tuple(found),
            heads=(head,),
            reads=reads,
            options=options_of_class(model.config) if HEADS[head].bare else (),
        )
    prove(model, family)
    return family


def options_of_class(config: Any) -> tuple[tuple[str, object], ...]:
    """Return the constructor arguments of a config's bare transformers class: no pooler, where it has the choice."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return ()
    known = inspect.signature(MODEL_MAPPING[type(config)]).parameters
    return (("add_pooling_layer", False),) if "add_pooling_layer" in known else ()


def prove(model: nn.Module, family: Family) -> float:
    """Check a row against a dense model; return the largest relative difference of its outputs with K = E.

    ValueError, with the reason, where the row is wrong. It replaces one layer at a time and puts it back, so that it
    takes the memory of the model and one layer.
    """
    worst = 0.0
    with _evaluation(model):
        trial = _Trial(model)
        dense = trial.outputs()
        if not any(tensor.any() for tensor in dense):
            raise ValueError("its output on a random input is zero, which proves nothing")
        for stack, layers in stacks_in(model, family):
            for index, block in enumerate(layers):
                path = f"{stack.layers}.{index}"
                try:
                    ffn = read_block(block, stack, activation_in(model.config, stack))
                except AttributeError as error:
                    raise ValueError(f"{path} is not built as the row says: {error}") from None
                misfit = trial.misfit(block, stack, ffn)
                if not misfit <= FFN_TOLERANCE:
                    raise ValueError(
                        f"{path} does not compute an FFN with the activation {ffn.activation}: from {stack.w_in} to "
                        f"{stack.w_out} the output differs by {misfit:.1e} of its size"
                    )
                with _kept(block, (*stack.bypass, stack.install)):
                    install_in_block(block, stack, _AllSlices(ffn))
                    difference = max(_difference(a, b) for a, b in zip(trial.outputs(), dense, strict=True) if b.any())
                if not difference <= MODEL_TOLERANCE:
                    raise ValueError(
                        f"with all experts chosen in the place of {path}.{stack.install} the model's output differs by "
                        f"{difference:.1e} of its size: the layer does more with its FFN than the row says"
                    )
                worst = max(worst, difference)
    return worst


def example_inputs(model: nn.Module, *, batch: int = 2, length: int = 8) -> dict[str, Tensor]:
    """Return random inputs for a model of text, images or speech: tokens [B, L], pixels, mel features.

    ValueError for a model that asks for something else.
    """
    generator = torch.Generator().manual_seed(0)
    takes = inspect.signature(model.forward).parameters
    config, device = model.config, next(model.parameters()).device
    inputs: dict[str, Tensor] = {}

    def tokens() -> Tensor:
        size = config.get_text_config(decoder=True).vocab_size
        span = min(length, positions(config) or length)
        ids_BL = torch.randint(min(5, size - 1), size, (batch, span), generator=generator)
        end = config.eos_token_id if isinstance(getattr(config, "eos_token_id", None), int) else -1
        if 0 <= end < size:  # T5's and BART's classifiers read the one end of a text
            ids_BL[ids_BL == end] = (end + 1) % size
            ids_BL[:, -1] = end
        return ids_BL

    if model.main_input_name == "input_ids":
        inputs["input_ids"] = tokens()
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
    if "pixel_values" in takes:
        seeing = getattr(config, "vision_config", config)
        side = getattr(seeing, "image_size", None)
        height, width = side if isinstance(side, Sequence) else (side, side)
        if height and width:
            shape = (batch, getattr(seeing, "num_channels", 3), height, width)
            inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens()
    if model.main_input_name not in inputs:
        raise ValueError(f"it reads {model.main_input_name}, for which there is no example")
    return {name: tensor.to(device) for name, tensor in inputs.items()}


class _Trial:
    """A model and one random input that it runs on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs = example_inputs(model)

    @torch.no_grad()
    def outputs(self) -> list[Tensor]:
        """Return all outputs of the model for the input, without caches; the same each time, even if it is random."""
        more = {"use_cache": False} if "use_cache" in inspect.signature(self.model.forward).parameters else {}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return list(_tensors(self.model(**self.inputs, **more, return_dict=True)))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            raise ValueError(f"the model does not run on a random input: {error}") from error

    def misfit(self, block: nn.Module, stack: Stack, ffn: DenseFFN) -> float:
        """Return how far, relative to its size, the output of `w_out` is from the FFN's, on random input to `w_in`.

        ValueError for a layer that runs more than once in a pass; infinity for one that does not run.
        """
        answer = self.response(block, {path for path in (stack.w_in, stack.w_gate) if path}, stack.w_out, ffn)
        return float("inf") if answer is None else _difference(ffn(answer[0]), answer[1])

    def response(self, block: nn.Module, sources: set[str], sink: str, ffn: DenseFFN) -> tuple[Tensor, Tensor] | None:
        """Feed random input [..., D] to the modules at `sources`; return it and the output of the module at `sink`.

        The input is large enough to distinguish the activations. None where the modules do not belong together.
        """
        rows_FD = ffn.w_in_FD if ffn.w_gate_FD is None else ffn.w_gate_FD
        size = _PREACTIVATION / rows_FD.norm(dim=1).median().clamp(min=1e-12)
        fed: dict[torch.Size, Tensor] = {}
        taken: list[Tensor] = []

        def feed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            shape = args[0].shape
            if shape not in fed:
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
                fed[shape] = noise.to(args[0]) * size
            return (fed[shape], *args[1:])

        def take(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            taken.append(output.clone() if isinstance(output, Tensor) else output)  # Falcon adds to it in place

        with ExitStack() as hooks:
            for path in sources:
                hooks.enter_context(_removed(block.get_submodule(path).register_forward_pre_hook(feed)))
            hooks.enter_context(_removed(block.get_submodule(sink).register_forward_hook(take)))
            try:
                self.outputs()
            except ValueError:  # a module that does not take one tensor
                return None
        if len(taken) > 1:
            raise ValueError(
                f"{sink} runs {len(taken)} times in one pass: its weights are shared between places, and a mixture in "
                "one would be a mixture in all"
            )
        if len(fed) != 1 or not taken or not isinstance(taken[0], Tensor):
            return None
        (x,) = fed.values()
        if x.shape[-1] != ffn.w_in_FD.shape[1] or taken[0].shape != x.shape:
            return None
        return x, taken[0]

    def place(self, block: nn.Module, stack: Stack, ffn: DenseFFN) -> Stack:
        """Return the row with the place of the mixture: the FFN's module, else its first step."""
        paths = [path for path in (stack.w_in, stack.w_out, stack.w_gate) if path]
        parent = _common(paths)
        if parent:
            module = block.get_submodule(parent)
            own = {id(p) for path in paths for p in block.get_submodule(path).parameters()}
            alone = all(id(p) in own for p in module.parameters())
            answer = self.response(block, {parent}, parent, ffn) if alone else None
            if answer is not None and _difference(ffn(answer[0]), answer[1]) <= FFN_TOLERANCE:
                return replace(stack, install=parent, bypass=())
        if stack.gated:
            raise ValueError(f"the gated FFN of {stack.w_in} and {stack.w_out} is not a module of its own")
        between = self._between(block, stack)
        if not between:
            raise ValueError(
                f"no module between {stack.w_in} and {stack.w_out} applies the activation, and they are not a module "
                "of their own: a mixture cannot take their place"
            )
        return replace(stack, install=stack.w_in, bypass=(*between, stack.w_out))

    def _between(self, block: nn.Module, stack: Stack) -> list[str]:
        """Return the modules without weights that run between `w_in` and `w_out`, without dropout."""
        order: list[str] = []
        with ExitStack() as hooks:
            for path, module in block.named_modules():
                if not any(True for _ in module.children()):

                    def note(*_: Any, path: str = path) -> None:
                        order.append(path)

                    hooks.enter_context(_removed(module.register_forward_hook(note)))
            self.outputs()
        between = order[order.index(stack.w_in) + 1 : order.index(stack.w_out)]
        weighty = [path for path in between if any(True for _ in block.get_submodule(path).parameters())]
        if weighty:
            raise ValueError(f"{weighty[0]}, between {stack.w_in} and {stack.w_out}, has weights of its own")
        return [path for path in between if not isinstance(block.get_submodule(path), nn.Dropout | nn.Identity)]


def _lists(base: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists of modules of a model."""
    seen: list[str] = []
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{p}.") for p in seen):
            seen.append(path)
            yield path, module


def _find(trial: _Trial, path: str, layers: nn.ModuleList) -> Stack | None:
    """Return where the layers of one list keep their FFNs; None for a list that can have none."""
    shapes = [_linears(layer) for layer in layers]
    candidates = list(_candidates(path, shapes[0]))
    if not candidates and not any(True for shape in shapes for _ in _candidates(path, shape)):
        return None
    unlike = [index for index, shape in enumerate(shapes) if shape != shapes[0]]
    if unlike:
        raise ValueError(f"the layers of {path} are not alike: layer {unlike[0]} has other linear maps than layer 0")
    fits: list[tuple[Stack, DenseFFN]] = []
    for stack in candidates:
        ffn = read_block(layers[0], stack, "relu")
        answer = trial.response(layers[0], {name for name in (stack.w_in, stack.w_gate) if name}, stack.w_out, ffn)
        if answer is None:
            continue
        for activation in ACTIVATIONS:
            ffn = replace(ffn, activation=activation)
            if _difference(ffn(answer[0]), answer[1]) <= FFN_TOLERANCE:
                fits.append((replace(stack, activation=activation), ffn))
    if not fits:
        tried = " and ".join((candidates[0].w_in, candidates[0].w_out))
        raise ValueError(
            f"in the layers of {path} no linear maps compute an FFN with one of the activations "
            f"{', '.join(ACTIVATIONS)}, not even {tried}"
        )
    if len(fits) > 1:
        pairs = "; ".join(f"{stack.w_in} and {stack.w_out}" for stack, _ in fits)
        raise ValueError(f"the layers of {path} have more than one FFN each: {pairs}")
    return trial.place(layers[0], *fits[0])


def _linears(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the numbers of inputs and outputs of every linear map of a layer, by its path."""
    from transformers.pytorch_utils import Conv1D

    return {
        path: (module.weight.shape[0], module.weight.shape[1])
        if isinstance(module, Conv1D)
        else (module.in_features, module.out_features)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def _candidates(path: str, shapes: dict[str, tuple[int, int]]) -> Iterator[Stack]:
    for w_out, (inner, width) in shapes.items():
        wide = [name for name, shape in shapes.items() if shape == (width, inner) and name != w_out]
        if inner > width:
            yield from (Stack(path, name, w_out, "") for name in wide)
        if inner == width:  # attention
            continue
        yield from (Stack(path, name, w_out, "", w_gate=gate) for name, gate in permutations(wide, 2))
        doubled = [name for name, shape in shapes.items() if shape == (width, 2 * inner) and name != w_out]
        yield from (Stack(path, name, w_out, "", fused=True) for name in doubled)


def _common(paths: list[str]) -> str:
    """Return the path of the innermost module that holds all of these."""
    shared: list[str] = []
    for parts in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


class _AllSlices(nn.Module):
    """The sum over `_EXPERTS` slices of a dense FFN, each once: the output of a mixture with K = E."""

    def __init__(self, ffn: DenseFFN) -> None:
        super().__init__()
        expert_of_neuron_F = torch.arange(ffn.ffn_width, device=ffn.w_in_FD.device) * _EXPERTS // ffn.ffn_width
        self.slices = [ffn.narrow((expert_of_neuron_F == index).nonzero().flatten()) for index in range(_EXPERTS)]
        self.b_out_D = ffn.b_out_D

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        y = sum(one(x) for one in self.slices)
        return y if self.b_out_D is None else y + self.b_out_D


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value of `b`; infinity where `b` is zero."""
    size = b.abs().max()
    return ((a - b).abs().max() / size).item() if size > 0 else float("inf")


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _kept(block: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Put the modules at these paths back on exit."""
    modules = [block.get_submodule(path) for path in paths]
    try:
        yield
    finally:
        for path, module in zip(paths, modules, strict=True):
            block.set_submodule(path, module)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
