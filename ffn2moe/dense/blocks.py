"""Read and replace the FFN of one transformer layer, by the row of its family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffn2moe.dense.ffn import ACTIVATIONS, DenseFFN

if TYPE_CHECKING:
    from ffn2moe.dense.families import Family, Stack
    from ffn2moe.literals import Activation

# Names that transformers' configs use for the activations (transformers.activations.ACT2FN).
_ACTIVATION_NAMES: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def read_block(block: nn.Module, stack: Stack, activation: Activation) -> DenseFFN:
    """Return the weights of the FFN of one transformer layer, as float32 copies."""
    from transformers.pytorch_utils import Conv1D

    def weight(path: str) -> tuple[Tensor, Tensor | None]:
        linear = block.get_submodule(path)
        matrix = linear.weight.T if isinstance(linear, Conv1D) else linear.weight  # GPT-2 keeps [in, out]
        bias = getattr(linear, "bias", None)
        return _copy(matrix), None if bias is None else _copy(bias)

    w_in_FD, b_in_F = weight(stack.w_in)
    w_out_DF, b_out_D = weight(stack.w_out)
    w_gate_FD, b_gate_F = weight(stack.w_gate) if stack.w_gate else (None, None)
    if stack.fused:
        w_gate_FD, w_in_FD = (half.clone() for half in w_in_FD.chunk(2))
        b_gate_F, b_in_F = (None, None) if b_in_F is None else (half.clone() for half in b_in_F.chunk(2))
    return DenseFFN(w_in_FD, w_out_DF, activation, b_in_F, b_out_D, w_gate_FD, b_gate_F)


@torch.no_grad()
def write_block(block: nn.Module, stack: Stack, ffn: DenseFFN) -> None:
    """Set the weights of the FFN of one transformer layer: the inverse of `read_block`.

    ValueError where the layer has an FFN of another width.
    """
    from transformers.pytorch_utils import Conv1D

    def put(path: str, matrix: Tensor, bias: Tensor | None) -> None:
        linear = block.get_submodule(path)
        target = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        if target.shape != matrix.shape:
            raise ValueError(
                f"{path} is {list(target.shape)}, and the FFN to be written {list(matrix.shape)}: the model's config "
                "does not set the width of its FFNs, so they stay as wide as they are"
            )
        target.copy_(matrix)
        if bias is not None:
            linear.bias.copy_(bias)

    w_in_FD, b_in_F = ffn.w_in_FD, ffn.b_in_F
    if stack.fused:
        assert ffn.w_gate_FD is not None
        w_in_FD = torch.cat([ffn.w_gate_FD, w_in_FD])
        b_in_F = None if b_in_F is None or ffn.b_gate_F is None else torch.cat([ffn.b_gate_F, b_in_F])
    elif stack.w_gate:
        assert ffn.w_gate_FD is not None
        put(stack.w_gate, ffn.w_gate_FD, ffn.b_gate_F)
    put(stack.w_in, w_in_FD, b_in_F)
    put(stack.w_out, ffn.w_out_DF, ffn.b_out_D)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def install_in_block(block: nn.Module, stack: Stack, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of this layer of a stack."""
    for path in stack.bypass:
        block.set_submodule(path, nn.Identity())
    block.set_submodule(stack.install, ffn)
    ffn.takes_ffns_place = True


def installed_ffns(model: nn.Module) -> list[nn.Module]:
    """Return the modules that stand in the place of FFNs, in the order of the layers: mixtures, or anything else."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()  # parts of a module that is found already
    for module in model.modules():
        if getattr(module, "takes_ffns_place", False) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def activation_in(config: Any, stack: Stack) -> Activation:
    """Return the activation of a stack's FFNs by the model's config; ValueError for one that no expert computes."""
    if stack.activation in ACTIVATIONS:
        return stack.activation
    part = getattr(config, stack.config, config) if stack.config else config
    name = getattr(part, stack.activation, None)
    if name not in _ACTIVATION_NAMES:
        raise ValueError(f"the FFN activation {name!r} is not supported; supported are: {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]


def stacks_in(model: nn.Module, family: Family) -> list[tuple[Stack, nn.ModuleList]]:
    """Return the stacks that this model has, each with its layers, in the order of the family's row.

    ValueError for a model without any of them.
    """
    found = []
    for stack in family.stacks:
        if stack.where is not None and getattr(model.config, stack.where[0], None) != stack.where[1]:
            continue
        try:
            found.append((stack, model.base_model.get_submodule(stack.layers)))
        except AttributeError:  # one tower alone, or an encoder without its decoder
            continue
    if not found:
        paths = " or ".join(sorted({stack.layers for stack in family.stacks}))
        raise ValueError(
            f"a {type(model).__name__} has no layers at {paths}, where {family.name} models keep their FFNs"
        )
    return found
