"""A routed layer's forward pass in two launches of one Triton kernel: grouped products that gather, activate and weigh.

A tile of rows belongs to one expert, so that a program finds its expert in a table and works as
in a plain product. The first launch reads tokens where they lie and writes activations times gates; the second
multiplies them by the output matrices. Needs Triton, which comes with PyTorch for GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffn2moe.moe.grouped import Layout, tile_of
from ffn2moe.moe.layer import MoEFFN

COLUMNS, DEPTH = 64, 64  # of the tile that a program works out, and of the products that it sums up at a time
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}


@triton.jit
def _activate(value, KIND: tl.constexpr):  # noqa: ANN001, ANN202
    if KIND == 1:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif KIND == 2:
        value = value / (1.0 + tl.exp(-value))
    elif KIND == 3:
        value = tl.maximum(value, 0.0)
    return value


@triton.jit
def _experts(
    x,  # noqa: ANN001
    row_S,  # noqa: ANN001
    expert_of_tile,  # noqa: ANN001
    weight_EOI,  # noqa: ANN001
    bias_EO,  # noqa: ANN001
    gate_EOI,  # noqa: ANN001
    weigh_S,  # noqa: ANN001
    y_SO,  # noqa: ANN001
    O,  # noqa: ANN001, E741
    I,  # noqa: ANN001, E741
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    slot = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    row = tl.load(row_S + slot).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, I, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth[None, :] < I
        a = tl.load(x + row[:, None] * I + depth[None, :], mask=inside, other=0.0)
        at = (expert * O + column[None, :]) * I + depth[:, None]
        known = (column[None, :] < O) & (depth[:, None] < I)
        total = tl.dot(a, tl.load(weight_EOI + at, mask=known, other=0.0), total, input_precision="ieee")
        if GATED:
            gate = tl.dot(a, tl.load(gate_EOI + at, mask=known, other=0.0), gate, input_precision="ieee")
    written = column < O
    if BIAS:
        total += tl.load(bias_EO + expert * O + column, mask=written, other=0.0).to(tl.float32)[None, :]
    if GATED:  # noqa: SIM108 (the compiler takes the statement)
        total = _activate(gate, KIND) * total
    else:
        total = _activate(total, KIND)
    if WEIGHED:
        total *= tl.load(weigh_S + slot).to(tl.float32)[:, None]
    at = slot.to(tl.int64)[:, None] * O + column[None, :]
    tl.store(y_SO + at, total.to(y_SO.dtype.element_ty), mask=written[None, :])


def _launch(
    x: Tensor,
    row_S: Tensor,
    expert_of_tile: Tensor,
    weight_EOI: Tensor,
    rows: int,
    *,
    bias_EO: Tensor | None = None,
    gate_EOI: Tensor | None = None,
    weigh_S: Tensor | None = None,
    kind: str = "none",
) -> Tensor:
    _, O, I = weight_EOI.shape  # noqa: E741
    y_SO = x.new_empty(len(row_S), O)
    _experts[(len(expert_of_tile), triton.cdiv(O, COLUMNS))](
        x,
        row_S,
        expert_of_tile,
        weight_EOI,
        weight_EOI if bias_EO is None else bias_EO,
        weight_EOI if gate_EOI is None else gate_EOI,
        weight_EOI if weigh_S is None else weigh_S,
        y_SO,
        O,
        I,
        KIND=ACTIVATIONS[kind],
        BIAS=bias_EO is not None,
        GATED=gate_EOI is not None,
        WEIGHED=weigh_S is not None,
        ROWS=rows,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
    )
    return y_SO


@torch.no_grad()
def routed(moe: MoEFFN, x_TD: Tensor) -> Tensor:
    """What `moe(x_TD)` gives, [T, D]: its router, the two launches, and the sum of each token's slots.

    ValueError for an activation that the kernel does not know, a shared expert, or a bias of the gate matrix.
    """
    if moe.activation not in ACTIVATIONS or moe.shared_in is not None or moe.b_gate is not None:
        raise ValueError(f"the Triton kernel knows plain experts with one of {sorted(ACTIVATIONS)}")
    scores_TE = moe.scores(x_TD)
    choice = moe.router.choose(scores_TE, moe.num_active)
    tile = tile_of(choice.experts_TK.numel(), moe.num_experts)
    layout = Layout.of(choice, moe.num_experts, tile)
    tiles = torch.tensor([width // tile for width in layout.widths], device=x_TD.device)
    expert_of_tile = torch.arange(moe.num_experts, device=x_TD.device).repeat_interleave(tiles)
    gate_TK = moe.scale * moe.router.weigh(scores_TE, choice)
    gate_P = gate_TK.flatten() if choice.used_TK is None else gate_TK[choice.used_TK]
    h_SM = _launch(
        x_TD,
        layout.token_S,
        expert_of_tile,
        moe.w_in,
        tile,
        bias_EO=moe.b_in,
        gate_EOI=moe.w_gate,
        weigh_S=layout.spread(gate_P),
        kind=moe.activation,
    )
    slots = torch.arange(len(layout.token_S), device=x_TD.device)
    y_TD = layout.add_up(_launch(h_SM, slots, expert_of_tile, moe.w_out, tile))
    return y_TD if moe.b_out is None else y_TD + moe.b_out.to(y_TD.dtype)
