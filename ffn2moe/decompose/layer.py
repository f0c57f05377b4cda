"""From dense FFNs to routed mixtures, a layer at a time: what the stages, `convert` and `stream` are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ffn2moe.data.batches import Batch
from ffn2moe.decompose import oracle
from ffn2moe.decompose.inputs import chunk_of
from ffn2moe.decompose.partition import PartitionMethod, partition_with_shared, token_groups
from ffn2moe.decompose.router_fit import Objective, Start, phases, start_weights, train_router
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.experts import neurons_by_expert, shared_neurons, slice_experts
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import low_precision
from ffn2moe.spec import MoESpec


@torch.no_grad()
def carve(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    gradient_TD: Tensor | None = None,
    guarded: Tensor | None = None,
) -> MoEFFN:
    """The mixture of one layer: the FFN's neurons divided by what they do on tokens [T, D], and nothing trained.

    `spec` says how many experts, how wide, and by which partition; the router scores all alike. `gradient_TD` is that
    of the loss at the FFN's output (`output_gradients`), which the partition `gradient` needs. The neurons `guarded`
    always belong to the shared expert.
    """
    shape = spec.shape_of(layer)
    method: PartitionMethod = spec.partition  # type: ignore[assignment]
    statistics = neuron_statistics(ffn, x_TD, method, spec.num_experts, shape.shared_width, seed, gradient_TD)
    expert_of_neuron_F = partition_with_shared(
        method, ffn, statistics, spec.num_experts, seed, shape.shared_width, guarded
    )
    neurons_EM = neurons_by_expert(expert_of_neuron_F, spec.num_experts, shape.expert_width)
    return mixture(ffn, neurons_EM, shared_neurons(expert_of_neuron_F), spec, layer)


def mixture(ffn: DenseFFN, neurons_EM: Tensor, shared_S: Tensor, spec: MoESpec, layer: int) -> MoEFFN:
    """The mixture of one layer under a partition that is known."""
    return MoEFFN.from_experts(spec, slice_experts(ffn, neurons_EM, shared_S), neurons_EM, layer, shared_S).eval()


@torch.no_grad()
def largest_contributions(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """The most that each neuron adds to the FFN's output on tokens [T, D], [F]: what `super_neurons` are told by."""
    return neuron_statistics(ffn, x_TD, "nested", 1, 0, 0).largest_contribution(ffn)


@torch.no_grad()
def outputs(ffn: DenseFFN, x_TD: Tensor) -> Tensor:
    """Output of a dense FFN, [T, D], a part of the tokens at a time, as something to fit to (`low_precision`)."""
    found_TD = torch.empty_like(x_TD)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk := chunk_of(ffn.ffn_width)):
            found_TD[start : start + chunk] = ffn(x_TD[start : start + chunk])
    return found_TD


def neuron_statistics(
    ffn: DenseFFN,
    x_TD: Tensor,
    method: PartitionMethod,
    num_experts: int,
    shared_width: int,
    seed: int,
    gradient_TD: Tensor | None = None,
) -> NeuronStatistics:
    """What a partition into experts, and into S shared neurons, asks of the neurons on tokens [T, D]."""
    weighed = method == "gradient" and gradient_TD is not None
    statistics = NeuronStatistics(ffn.ffn_width, num_experts if weighed else 0, profiles=method == "coactivation")
    if method not in ("coactivation", "gradient", "nested") and shared_width == 0:
        return statistics
    group_T = token_groups(x_TD, num_experts, seed) if weighed else None
    chunk = chunk_of(ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            h_TF = ffn.neurons(x_TD[rows])
            statistics.update(h_TF)
            if gradient_TD is not None and group_T is not None:
                statistics.update_importance(h_TF, gradient_TD[rows] @ ffn.w_out_DF, group_T[rows])
    return statistics


def fit_router(
    moe: MoEFFN,
    x_TD: Tensor,
    *,
    ridge: float,
    steps: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    start: Start = "ridge",
    objective: Objective = "oracle",
    temperature: float = 1.0,
    text_T: Tensor | None = None,
    route_TD: Tensor | None = None,
) -> list[float]:
    """Fit a layer's router to the oracle's choices on tokens [T, D], and its scale and mean to the router.

    From `start` (with the penalty `ridge`) by `steps` of AdamW on `objective`, the scores divided by `temperature` at
    first and by 1 at last (ffn2moe.decompose.router_fit); returns the loss of each step. No expert changes. How many
    experts a token uses on average is calibrated where the selection leaves it open.

    With routing `sequence` the router reads `route_TD`, the means of the tokens' texts (ffn2moe.moe.texts.text_means),
    and its labels are sums over the tokens of each text, `text_T` [T] (`texts_of`). ValueError without them, and for
    starts and objectives about single experts where the selection is `prefix`.
    """
    read_RD = x_TD
    if moe.routing == "sequence":
        if text_T is None or route_TD is None:
            raise ValueError("routing 'sequence' fits routers to whole texts: give text_T and route_TD of the tokens")
        read_RD = x_TD.new_zeros(int(text_T.max()) + 1, x_TD.shape[1])
        read_RD[text_T] = route_TD
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    survey = oracle.survey(moe, x_TD, chunk, text_T if moe.routing == "sequence" else None)
    moe.router.set(*start_weights(start, moe, read_RD, survey, x_TD, penalty=ridge, chunk=chunk))
    losses = list(
        train_router(
            moe.router,
            read_RD,
            phases(objective, moe, x_TD, survey, text_T=text_T if moe.routing == "sequence" else None, chunk=chunk),
            steps=steps,
            batch_rows=max(1, batch_tokens * len(read_RD) // len(x_TD)),
            learning_rate=learning_rate,
            seed=seed,
            temperature=temperature,
        )
    )
    moe.calibrate(x_TD, route_TD)
    part = slice(chunk)  # one number, so a part of the tokens will do
    moe.fit_router_scale(x_TD[part], None if route_TD is None else route_TD[part])
    if moe.b_out is None:
        oracle.fit_scales(moe, survey.grams, read_RD)
    else:
        moe.fit_scale_and_mean(x_TD, chunk, route_TD)
    return losses


@contextmanager
def every_expert(layers: Sequence[MoEFFN]) -> Iterator[None]:
    """For a while, each layer is the dense FFN that it was carved from: K = E and equal scores."""
    changed = ("router.", "output_scale", "elastic_scale.")
    kept = [
        (moe.num_active, {k: v.clone() for k, v in moe.state_dict().items() if k.startswith(changed)}) for moe in layers
    ]
    for moe in layers:
        moe.use_all_experts()
    try:
        yield
    finally:
        for moe, (num_active, tensors) in zip(layers, kept, strict=True):
            moe.num_active = num_active
            moe.load_state_dict(tensors, strict=False)


@torch.no_grad()
def output_of(model: Any, batch: Batch) -> Tensor:
    """What a model gives for a batch, its logits or else its last hidden state, where that is no padding. [N, ...]"""
    found = model(**batch.inputs)
    output = found.logits if getattr(found, "logits", None) is not None else found[0]
    if batch.mask is not None and output.shape[:2] == batch.mask.shape:
        return output[batch.mask.bool()]
    return output
