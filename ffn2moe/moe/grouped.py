"""Sort tokens by the experts that they use and multiply by those experts' weights alone, forward and backward.

A `Layout` holds the place of each used (token, expert) pair. Its methods are the three steps of a routed layer: copy
tokens to their slots, multiply each expert's run of slots by that expert's weights, and add up the slots of each token.
Each step is linear and has a gradient written by hand: every product goes straight into its place in one buffer, one
cast brings the weights of all experts to the dtype of the tokens, the gradient of a copy is a sum and the gradient of a
sum is a copy. No addition is atomic, so that results are the same every time.

Letters in addition to those of `ffn2moe.spec`: P used pairs, S slots (pairs and padding), I and O widths of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ffn2moe.moe.choice import Choice

# Runs are rounded up to this, or to less where they are short: oneDNN compiles a kernel for every new shape, which
# costs more than the padding (measured: 2.0 ms a product, not 0.1 ms).
TILE = 128
LEAST_TILE = 16  # the grouped products of accelerators need runs aligned to this
TILES = 4  # an average run has at least so many tiles, so that padding adds an eighth

# A separate bfloat16 product takes longer than one in a batch, by the time of so many operations: 15 us at 1e12 a
# second, measured with `torch.mm` and `torch.bmm` on 16 to 256 slots an expert with AMX.
OVERHEAD = 1.5e7


def most_padding(x_TD: Tensor, weight_EMD: Tensor) -> int:
    """Return how many slots may be added to make all runs equally long, for one batched product of all experts.

    So many slots take no longer than the batched product saves. Only bfloat16 on a CPU gains: in float32 a product has
    hardly any overhead, and accelerators multiply groups of any length at once.
    """
    E, M, D = weight_EMD.shape
    gains = x_TD.device.type == "cpu" and x_TD.dtype == torch.bfloat16
    return int(E * OVERHEAD / (2 * M * D)) if gains else 0


def tile_of(pairs: int, num_experts: int) -> int:
    """Return the multiple that runs are rounded up to: the same for numbers of pairs that are near each other."""
    tile = TILE
    while tile > LEAST_TILE and tile * TILES * num_experts > pairs:
        tile //= 2
    return tile


@dataclass(frozen=True)
class Layout:
    """The used (token, expert) pairs sorted by expert, each expert's run rounded up to whole tiles or to the longest.

    Padding slots hold token 0; nothing reads them, and they give no gradient.
    """

    token_S: Tensor  # int64: the token of every slot
    slot_P: Tensor  # int64: the slot of every pair, in the order of `Choice.pairs`
    start_T: Tensor  # int64: where each token's pairs start in `slot_P`
    counts: list[int]  # used slots of each expert's run
    widths: list[int]  # all its slots

    @classmethod
    def of(cls, choice: Choice, num_experts: int, tile: int = 1, most_padding: int = 0) -> Layout:
        """Return the layout of a choice, with runs rounded up to multiples of `tile`.

        Runs are rounded up to the longest run where that adds at most `most_padding` slots in all.
        """
        token_P, expert_P = choice.pairs()
        count_E = torch.bincount(expert_P, minlength=num_experts)
        width_E = (count_E + tile - 1) // tile * tile
        if most_padding and num_experts * width_E.max() - width_E.sum() <= most_padding:
            width_E = width_E.max().expand(num_experts)
        # A pair's slot: where its expert's run starts, plus its rank among the pairs of that expert.
        order = expert_P.argsort(stable=True)
        rank = torch.arange(len(expert_P), device=expert_P.device) - (count_E.cumsum(0) - count_E)[expert_P[order]]
        slot_P = torch.empty_like(expert_P).index_copy(0, order, (width_E.cumsum(0) - width_E)[expert_P[order]] + rank)
        counts, widths = torch.stack([count_E, width_E]).tolist()
        token_S = torch.zeros(sum(widths), dtype=torch.int64, device=expert_P.device)
        token_S[slot_P] = token_P
        used_T = choice.count_T()
        return cls(token_S, slot_P, used_T.cumsum(0) - used_T, counts, widths)

    def gather(self, x_TD: Tensor) -> Tensor:
        """Return the row of every slot's token, [S, D]."""
        found: Tensor = _Gather.apply(x_TD, self)
        return found

    def add_up(self, y_SD: Tensor) -> Tensor:
        """Return the sum over the slots of every token, [T, D]; 0 for a token that uses no expert."""
        found: Tensor = _AddUp.apply(y_SD, self)
        return found

    def linear(self, x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
        """Return each slot's row times the weights of its expert, plus its bias, [S, O], in the dtype of the rows."""
        found: Tensor = _Linear.apply(x_SI, weight_EOI, bias_EO, self.counts, self.widths)
        return found

    def spread(self, value_P: Tensor) -> Tensor:
        """Return a number of each pair at its slot, [S]; 0 in the padding."""
        return value_P.new_zeros(len(self.token_S)).index_copy(0, self.slot_P, value_P)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return x_TD.index_select(0, layout.token_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None]:
        return _sum_of_slots(gradient_SD, ctx.layout), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return _sum_of_slots(y_SD, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None]:
        gradient_SD = gradient_TD.index_select(0, ctx.layout.token_S)
        for run_SD, count in zip(gradient_SD.split(ctx.layout.widths), ctx.layout.counts, strict=True):
            run_SD[count:].zero_()
        return gradient_SD, None


def _sum_of_slots(y_SD: Tensor, layout: Layout) -> Tensor:
    """Add up the slots of each token, [T, D]: an `embedding_bag` gathers and sums in one pass, in order."""
    return F.embedding_bag(layout.slot_P, y_SD, layout.start_T, mode="sum")


class _Linear(torch.autograd.Function):
    """``y_s = W_e x_s + b_e`` for the expert e of each slot s."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts: list[int], widths: list[int]
    ) -> Tensor:
        ctx.counts, ctx.widths = counts, widths
        ctx.dtypes = (weight_EOI.dtype, None if bias_EO is None else bias_EO.dtype)
        weight_EOI = weight_EOI.to(x_SI.dtype)
        ctx.save_for_backward(x_SI, weight_EOI)
        if _grouped_in_hardware(x_SI, weight_EOI):
            y_SO = F.grouped_mm(x_SI, weight_EOI.mT, offs=_ends(widths, x_SI))
            if bias_EO is not None:
                y_SO += bias_EO.to(y_SO.dtype).repeat_interleave(torch.tensor(widths, device=x_SI.device), 0)
            return y_SO
        if _in_one_batch(x_SI, widths):
            y_ECO = torch.bmm(x_SI.unflatten(0, (len(widths), -1)), weight_EOI.mT)
            return (y_ECO if bias_EO is None else y_ECO.add_(bias_EO.to(y_ECO.dtype).unsqueeze(1))).flatten(0, 1)
        y_SO = x_SI.new_empty(len(x_SI), weight_EOI.shape[1])
        runs = zip(x_SI.split(widths), y_SO.split(widths), weight_EOI, strict=True)
        if bias_EO is None:
            for x, y, weight_OI in runs:
                torch.mm(x, weight_OI.T, out=y)
        else:
            for (x, y, weight_OI), bias_O in zip(runs, bias_EO.to(x_SI.dtype), strict=True):
                torch.addmm(bias_O, x, weight_OI.T, out=y)
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, weight_EOI = ctx.saved_tensors
        for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        hardware = _grouped_in_hardware(x_SI, weight_EOI)
        if not hardware and _in_one_batch(x_SI, ctx.widths):
            each = (len(ctx.widths), -1)
            gradient_ECO = gradient_SO.unflatten(0, each)
            return (
                torch.bmm(gradient_ECO, weight_EOI).flatten(0, 1) if for_x else None,
                torch.bmm(gradient_ECO.mT, x_SI.unflatten(0, each)).to(ctx.dtypes[0]) if for_weight else None,
                gradient_ECO.sum(1).to(ctx.dtypes[1]) if for_bias else None,
                None,
                None,
            )
        gradient_SI = gradient_EOI = gradient_EO = None
        parts = gradient_SO.split(ctx.widths)
        if for_x and hardware:
            gradient_SI = F.grouped_mm(gradient_SO, weight_EOI, offs=_ends(ctx.widths, x_SI))
        elif for_x:
            gradient_SI = torch.empty_like(x_SI)
            for part, weight_OI, out in zip(parts, weight_EOI, gradient_SI.split(ctx.widths), strict=True):
                torch.mm(part, weight_OI, out=out)
        if for_weight and hardware:
            gradient_EOI = F.grouped_mm(gradient_SO.T, x_SI, offs=_ends(ctx.widths, x_SI)).to(ctx.dtypes[0])
        elif for_weight:
            gradient_EOI = torch.empty_like(weight_EOI)
            for part, x, out in zip(parts, x_SI.split(ctx.widths), gradient_EOI, strict=True):
                torch.mm(part.T, x, out=out)
            gradient_EOI = gradient_EOI.to(ctx.dtypes[0])
        if for_bias:
            gradient_EO = torch.stack([part.sum(0) for part in parts]).to(ctx.dtypes[1])
        return gradient_SI, gradient_EOI, gradient_EO, None, None


def _in_one_batch(x_SI: Tensor, widths: list[int]) -> bool:
    """Return whether equally long runs make one batched product (`most_padding`)."""
    return x_SI.device.type == "cpu" and x_SI.dtype == torch.bfloat16 and 0 < min(widths) == max(widths)


def _ends(widths: list[int], like: Tensor) -> Tensor:
    """Return where each run ends, [E] int32."""
    return torch.tensor(list(accumulate(widths)), dtype=torch.int32, device=like.device)


def _grouped_in_hardware(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """Return whether one call multiplies all groups on this device: an accelerator, bfloat16, aligned rows."""
    kind = x_SI.device.type
    return (
        kind != "cpu"
        and x_SI.dtype == torch.bfloat16
        and weight_EOI.shape[1] % 8 == weight_EOI.shape[2] % 8 == 0
        and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_grouped_mm", kind.upper())
    )
