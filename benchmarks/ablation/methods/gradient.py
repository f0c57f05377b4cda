"""The partition `gradient`: neurons go to the experts whose tokens need them (LLaMA-MoE, arXiv 2406.16554).

It needs the gradients of the whole model, so the ablation binds one row to each layer (`for_layers`). The groups of
tokens are clusters at the layer's input, as in LLaMA-MoE v2 (arXiv 2411.15708).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from benchmarks.ablation.method import Method, add
from benchmarks.ablation.recipes import RECIPES, Recipe, train_ours
from ffn2moe.data.batches import Batch
from ffn2moe.decompose import gradients as core
from ffn2moe.decompose.clustering import balanced_kmeans
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.sentence import embed
from ffn2moe.numerics import chunk_of, low_precision

GROUP_DIRECTIONS = 64  # principal directions of the tokens that their clustering reads


def by_importance(importance_EF: Tensor) -> Tensor:
    """Return the expert of each neuron, [F], by its importance to E groups of tokens.

    Pairs of expert and neuron are taken in the order of their importance; a pair holds if the neuron is free and the
    expert not full.
    """
    E, width = importance_EF.shape
    least, wider = divmod(width, E)  # `wider` of the experts hold one neuron more
    expert_of_neuron = [-1] * width
    held = [0] * E
    for pair in importance_EF.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(pair, width)
        if expert_of_neuron[neuron] >= 0 or held[expert] > least or (held[expert] == least and not wider):
            continue
        wider -= held[expert] == least
        expert_of_neuron[neuron] = expert
        held[expert] += 1
    return torch.tensor(expert_of_neuron)


def token_groups(x_TD: Tensor, num_groups: int, seed: int) -> Tensor:
    """Return the group of each token [T, D], [T] int64: groups of about equal size, by their leading directions.

    ValueError if there are fewer tokens than groups.
    """
    if len(x_TD) < num_groups:
        raise ValueError(
            f"{len(x_TD)} calibration tokens do not make {num_groups} groups, which the gradient partition needs: "
            "give it more text"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        directions = min(GROUP_DIRECTIONS, *x_TD.shape)
        points_TP = torch.pca_lowrank(x_TD, directions)[0]
    return balanced_kmeans(points_TP, num_groups, seed)


class Importance:
    """Sum the neurons' importance ``|h_j dL/dh_j|`` to G groups of tokens, in float64."""

    def __init__(self, ffn_width: int, groups: int) -> None:
        self.members_G = torch.zeros(groups, dtype=torch.float64)
        self.sum_GF = torch.zeros(groups, ffn_width, dtype=torch.float64)

    def update(self, h_TF: Tensor, gradient_TF: Tensor, group_T: Tensor) -> None:
        """Add the activations and gradients of T tokens to the groups that they belong to, [T] from 0 to G - 1."""
        member_GT = F.one_hot(group_T, len(self.members_G)).T
        self.members_G += member_GT.sum(1)
        change_TF = (h_TF * gradient_TF).abs_()
        self.sum_GF += (member_GT.to(change_TF.dtype) @ change_TF).double().cpu()

    def mean(self) -> Tensor:
        """Return the mean over the tokens of each group, [G, F]: how the loss changes without the neuron."""
        return self.sum_GF / self.members_G.clamp(min=1).unsqueeze(1)


@torch.no_grad()
def assign(
    ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int, *, x_TD: Tensor, gradient_TD: Tensor
) -> Tensor:
    """Return the expert of each neuron, [F], from the inputs of a layer and the gradients at its output, [T, D]."""
    group_T = token_groups(x_TD, num_experts, seed)
    importance = Importance(ffn.ffn_width, num_experts)
    chunk = chunk_of(ffn.ffn_width)
    with low_precision(ffn.ffn_width, x_TD.device):
        for start in range(0, len(x_TD), chunk):
            rows = slice(start, start + chunk)
            importance.update(ffn.neurons(x_TD[rows]), gradient_TD[rows] @ ffn.w_out_DF, group_T[rows])
    return by_importance(importance.mean())


def _refuse(ffn: DenseFFN, statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    raise ValueError(
        "the gradient partition needs the neurons' importance to groups of tokens, from a backward pass through the "
        "whole model, which the ablation alone does: use coactivation"
    )


ROW = PARTITIONS.register("gradient", Partition("LLaMA-MoE, arXiv 2406.16554", _refuse))


def for_layers(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Partition]:
    """Return the row for each layer, bound to its inputs and the gradients at its output, [T, D] each."""
    pairs = zip(inputs, gradients, strict=True)
    return [replace(ROW, assign=partial(assign, x_TD=x_TD, gradient_TD=gradient_TD)) for x_TD, gradient_TD in pairs]


def output_gradients(
    model: Any,
    batches: Iterable[Batch],
    *,
    head: str,
    max_tokens: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """Return the gradient of the loss at the output of each layer's FFN, [T, D] for the tokens of `layer_inputs`.

    The loss of a language model is the cross-entropy of the next token. Other models have no loss without labels; there
    it is the output's part in a random direction of signs, one for each text. Squared and on average, its gradient is
    how far the output moves.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Tensor]] = []
    for gradients in core.output_gradients(
        model, batches, lambda model, batch: _loss(model, batch, head, generator), device=device
    ):
        found.append(gradients)
        if all(sum(map(len, parts)) >= max_tokens for parts in zip(*found, strict=True)):
            break
    return [torch.cat(parts)[:max_tokens] for parts in zip(*found, strict=True)]


def _loss(model: Any, batch: Batch, head: str, generator: torch.Generator) -> Tensor:
    """Return the loss that `output_gradients` differentiates: a sum over texts and tokens."""
    if head == "causal" or head == "seq2seq":
        logits_BLV = model(**batch.inputs).logits[:, :-1]
        ids_BL = batch.inputs["input_ids" if head == "causal" else "decoder_input_ids"][:, 1:]
        if batch.mask is not None:
            ids_BL = ids_BL.masked_fill(batch.mask[:, 1:] == 0, -100)  # which cross_entropy leaves out
        return F.cross_entropy(logits_BLV.flatten(0, 1).float(), ids_BL.flatten(), reduction="sum")
    if head == "embedding":
        assert batch.mask is not None
        output = embed(model, model(**batch.inputs)[0], batch.mask)
    else:
        found = model(**batch.inputs)
        output = found.logits if getattr(found, "logits", None) is not None else found[0]
    direction = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
    return (output * direction).sum()


def partitions(bench: Bench, cell: Cell, inputs: Sequence[Tensor]) -> list[Partition]:
    """Return the row for each layer, bound to the gradients of the whole model on the calibration texts."""
    gradients = output_gradients(
        bench.model(),
        bench.calibration(),
        head=bench.head,
        max_tokens=bench.budget.calibration_tokens,
        seed=cell.seed,
    )
    return for_layers(inputs, gradients)


RECIPES.register("gradient", Recipe(train_ours, partitions=partitions))
add(Method("gradient", "gradient", "partition", "LLaMA-MoE, arXiv 2406.16554", partition="gradient", recipe="gradient"))
