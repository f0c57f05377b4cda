"""Linear maps that cost less than a matrix, and the FFN that is built of them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.dense.ffn import ACTIVATIONS
from ffn2moe.spec import Activation


class LinearMap(nn.Module):
    """An affine map [..., I] -> [..., O]; subclasses store it in fewer numbers than I x O."""

    def flops(self) -> int:
        """Return the FLOPs of one input in matrix products: two a multiplication."""
        raise NotImplementedError


class Dense(LinearMap):
    """``weight x + bias``."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_OI.float().contiguous())
        self.bias = None if bias_O is None else nn.Parameter(bias_O.float())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def flops(self) -> int:
        return 2 * self.weight.numel()


class CompressedFFN(nn.Module):
    """A cheaper module in the place of an FFN: [..., D] -> [..., D], the same work for every token.

    ``y = w_out(act(w_in x)) + around x``, or with ``act(w_gate x) * w_in x`` inside; each map has its bias.
    """

    def __init__(
        self,
        activation: Activation,
        w_in: LinearMap,
        w_out: LinearMap,
        w_gate: LinearMap | None = None,
        around: LinearMap | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = w_in
        self.w_out = w_out
        self.w_gate = w_gate
        self.around = around

    def neurons(self, x: Tensor) -> Tensor:
        """Return the activations of the neurons that are left, [..., F]."""
        act = ACTIVATIONS[self.activation]
        return act(self.w_in(x)) if self.w_gate is None else act(self.w_gate(x)) * self.w_in(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w_out(self.neurons(x))
        return y if self.around is None else y + self.around(x)

    def flops(self) -> int:
        """Return the FLOPs of one token in matrix products; a sparse factor counts its non-zeros."""
        return sum(part.flops() for part in self.children() if isinstance(part, LinearMap))
