"""Hold and run the weights of one dense FFN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ffn2moe.literals import Activation

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
        """Whether a second linear map multiplies the first."""
        return self.w_gate_FD is not None

    @property
    def ffn_width(self) -> int:
        """F, in neurons."""
        return self.w_in_FD.shape[0]

    def narrow(self, neurons_S: Tensor) -> DenseFFN:
        """Return the FFN of these neurons alone, without the output bias."""

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
        """Return the activations of the neurons, [T, F]: they multiply the columns of `w_out`."""
        act = ACTIVATIONS[self.activation]
        h_TF = F.linear(x_TD, self.w_in_FD, self.b_in_F)
        if self.w_gate_FD is None:
            return act(h_TF)
        return act(F.linear(x_TD, self.w_gate_FD, self.b_gate_F)) * h_TF

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return the output of the FFN, [T, D]."""
        return F.linear(self.neurons(x_TD), self.w_out_DF, self.b_out_D)
