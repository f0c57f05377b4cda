"""The mixture of a cell: its experts by the method's partition, and its routers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from benchmarks.ablation.method import elastic_budgets
from benchmarks.ablation.recipes import RECIPES, Made
from ffn2moe.decompose import budget as layer_budget
from ffn2moe.decompose import oracle
from ffn2moe.decompose.layer import decompose_layer, outputs
from ffn2moe.decompose.layer import mixture as one_mixture
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec


def mixture(bench: Bench, cell: Cell) -> Made:
    """Return a model of experts, with routers up to the cell's stage."""
    method, budget = cell.method, bench.budget
    recipe = RECIPES[method.recipe]
    student = bench.model()
    spec, layers = decomposed(bench, cell, student)
    routed = []
    for index, moe in enumerate(layers):
        x_TD, held_out_TD = bench.inputs("router", index), bench.held_out(index)
        if recipe.set_router is None:
            settings = RouterSettings(
                steps=0 if cell.stage == "free" else budget.router_steps,
                batch_tokens=budget.router_batch_tokens,
                seed=cell.seed + index,
                learning_rate=budget.router_learning_rate,
                start=method.start,
                ridge=budget.ridge,
                objective=method.objective,
                temperature=method.temperature,
            )
            if recipe.fit is None:
                fit_router(moe, x_TD, settings)
            else:
                recipe.fit(bench, moe, x_TD, settings)
        else:
            recipe.set_router(moe)
        routed.append(recipe.diagnose(bench, moe, index) if recipe.diagnose else oracle.diagnose(moe, held_out_TD))
        if recipe.set_router is None and method.refit and budget.refit:
            wanted_TD = outputs(read_ffn(bench.teacher, index), x_TD)
            refit_outputs(moe, x_TD, wanted_TD, penalty=budget.refit)
    install_moe(student, layers)
    return Made(student.eval(), spec, tuple(routed))


def decomposed(bench: Bench, cell: Cell, model: Any) -> tuple[MoESpec, list[MoEFFN]]:
    """Return the spec of a cell and the experts of every layer, by the method's partition."""
    method, recipe = cell.method, RECIPES[cell.method.recipe]
    ffns = [read_ffn(model, index) for index in range(bench.num_layers)]
    inputs = [bench.inputs("calibration", index) for index in range(bench.num_layers)]
    guarded = recipe.guard.neurons(ffns, inputs) if recipe.guard else []
    spec = spec_of_cell(bench, cell, model, ffns[0], at_least=max(map(len, guarded), default=0))
    row = PARTITIONS[method.partition]
    partitions = recipe.partitions(bench, cell, inputs) if recipe.partitions else [row] * bench.num_layers
    layers = []
    for index, (ffn, x_TD) in enumerate(zip(ffns, inputs, strict=True)):
        shared_S = None
        if recipe.guard:
            width = spec.shape_of(index).shared_width
            shared_S = recipe.guard.shared(ffn, x_TD, partitions[index], width, guarded[index])
        layers.append(decomposed_layer(bench, cell, spec, index, ffn, x_TD, partitions[index], shared_S))
    if method.active_per_layer == "budget":
        errors = [layer_budget.errors_by_active(moe, x_TD) for moe, x_TD in zip(layers, inputs, strict=True)]
        spec = replace(spec, active_per_layer=layer_budget.allocate(torch.stack(errors), spec.num_active * len(errors)))
        layers = [
            one_mixture(ffn, moe.neurons, moe.shared_neurons, spec, index)
            for index, (ffn, moe) in enumerate(zip(ffns, layers, strict=True))
        ]
    return spec, layers


def decomposed_layer(
    bench: Bench,
    cell: Cell,
    spec: MoESpec,
    layer: int,
    ffn: DenseFFN,
    x_TD: Tensor,
    partition: Partition,
    shared_S: Tensor | None,
) -> MoEFFN:
    """Return the mixture of a layer. Cells with the same partition share it through a file."""
    shared_width = spec.shape_of(layer).shared_width
    kind = (spec.partition, spec.num_experts, shared_width, shared_S is not None, cell.seed, layer)
    settings = repr((bench.data, bench.budget.max_length, bench.budget.calibration_tokens, kind))
    path = bench.setup.cache / "partitions" / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    if path.is_file():
        found = load_file(path)
        return one_mixture(ffn, found["neurons"], found["shared"], spec, layer)
    moe = decompose_layer(ffn, x_TD, spec, layer, seed=cell.seed, partition=partition, shared_S=shared_S)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    save_file({"neurons": moe.neurons, "shared": moe.shared_neurons}, fresh)
    fresh.replace(path)
    return moe


def spec_of_cell(bench: Bench, cell: Cell, model: Any, ffn: DenseFFN, *, at_least: int) -> MoESpec:
    """Return the spec of a cell's mixture: K of E experts, or K - 1 beside a shared expert at the same cost.

    The shared expert has at least `at_least` neurons.
    """
    method, experts = cell.method, bench.budget.experts
    active, shared_width = cell.num_active, 0
    if method.shared:
        active -= 1
        shared_width = max(at_least, round(ffn.ffn_width / (experts - active)))  # S + (K - 1) (F - S) / E = K F / E
    others = sorted({*elastic_budgets(experts)} - {active}) if method.elastic else []
    return spec_of(
        model,
        head=bench.head,
        num_experts=experts,
        num_active=active,
        partition=method.partition,
        teacher=bench.setup.workspace.name,
        max_length=bench.budget.max_length,
        shared_width=shared_width,
        gate=method.gate,
        selection=method.selection,
        routing=method.routing,
        elastic=tuple(others),
    )
