"""Read, run and replace the weights of one dense FFN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.dense.families import Stack
from ffn2moe.spec import Activation

# Names that transformers' configs use for the activations above (transformers.activations.ACT2FN).
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

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one dense FFN, float32.

    Plain: ``y = w_out act(w_in x + b_in) + b_out``.
    Gated: ``y = w_out (act(w_gate x + b_gate) * (w_in x + b_in)) + b_out``.
    """

    w_in_FD: Tensor
    w_out_DF: Tensor
    activation: Activation
    b_in_F: Tensor | None = None
    b_out_D: Tensor | None = None
    w_gate_FD: Tensor | None = None
    b_gate_F: Tensor | None = None

    @property
    def gated(self) -> bool:
        return self.w_gate_FD is not None

    @property
    def ffn_width(self) -> int:
        return self.w_in_FD.shape[0]

    def narrow(self, neurons_S: Tensor) -> DenseFFN:
        """The part of the FFN that these neurons are, without the output bias."""

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[neurons_S]

        return replace(
            self,
            w_in_FD=self.w_in_FD[neurons_S],
            w_out_DF=self.w_out_DF[:, neurons_S].contiguous(),
            b_in_F=rows(self.b_in_F),
            b_out_D=None,
            w_gate_FD=rows(self.w_gate_FD),
            b_gate_F=rows(self.b_gate_F),
        )

    def neurons(self, x_TD: Tensor) -> Tensor:
        """Activations of the neurons, [T, F]: what multiplies the columns of `w_out`."""
        act = ACTIVATIONS[self.activation]
        h_TF = F.linear(x_TD, self.w_in_FD, self.b_in_F)
        if self.w_gate_FD is None:
            return act(h_TF)
        return act(F.linear(x_TD, self.w_gate_FD, self.b_gate_F)) * h_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Output of the FFN, [T, D]."""
        return F.linear(self.neurons(x_TD), self.w_out_DF, self.b_out_D)


def read_block(block: nn.Module, stack: Stack, activation: Activation) -> DenseFFN:
    """The weights of the FFN of one transformer layer, as float32 copies."""
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def install_in_block(block: nn.Module, stack: Stack, ffn: nn.Module) -> None:
    """Put `ffn` ([..., D] -> [..., D]) in the place of the FFN of this layer of a stack."""
    for path in stack.bypass:
        block.set_submodule(path, nn.Identity())
    block.set_submodule(stack.install, ffn)
    ffn.takes_ffns_place = True


def installed_ffns(model: nn.Module) -> list[nn.Module]:
    """What `install` has put in the place of FFNs, in the order of the layers: mixtures, or anything else."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()  # parts of one that is found already
    for module in model.modules():
        if getattr(module, "takes_ffns_place", False) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def activation_in(config: Any, stack: Stack) -> Activation:
    """The activation of a stack's FFNs by the model's config; ValueError for one that the experts do not implement."""
    if stack.activation in ACTIVATIONS:
        return stack.activation
    part = getattr(config, stack.config, config) if stack.config else config
    name = getattr(part, stack.activation, None)
    if name not in _ACTIVATION_NAMES:
        raise ValueError(f"the FFN activation {name!r} is not supported; supported are: {', '.join(_ACTIVATION_NAMES)}")
    return _ACTIVATION_NAMES[name]
