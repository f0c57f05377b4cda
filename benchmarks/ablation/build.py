"""A cell: the model that its method makes of the dense one, and what is found of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.ablation import compressors
from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell, Store
from benchmarks.ablation.linear_maps import CompressedFFN
from benchmarks.ablation.method import DEFAULT, elastic_budgets, kept_experts
from benchmarks.ablation.methods import gradient, guard
from benchmarks.ablation.recipes import RECIPES, Made, distil
from ffn2moe import metrics
from ffn2moe.decompose import oracle
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import decompose_layer, outputs
from ffn2moe.decompose.layer import mixture as one_mixture
from ffn2moe.decompose.partition import PARTITIONS, Partition
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.route import RouterSettings, fit_router
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe import checkpoint
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN, moe_layers, set_active
from ffn2moe.moe.texts import text_means
from ffn2moe.shrink import Tokens, shrink_model
from ffn2moe.spec import MoESpec


def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Everything that a cell finds: figures, what is kept, FFN errors, cost, and the seconds it took.

    `made` and `judged` are seconds on the clock; `processor` is what the process computed, which does not depend on
    what else the machine does.
    """
    begun, processor = time.monotonic(), time.process_time()
    made = make(bench, cell)
    built = time.monotonic()
    errors = ffn_errors(bench, made, cell)
    cost = cost_of(bench, made, errors)
    figures = bench.judge(made.model)
    return {
        "figures": figures,
        "kept": bench.kept(figures),
        "errors": errors,
        "cost": cost,
        "seconds": {
            "made": built - begun,
            "judged": time.monotonic() - built,
            "processor": time.process_time() - processor,
        },
    }


def make(bench: Bench, cell: Cell) -> Made:
    """The model of a cell, in eval mode."""
    torch.manual_seed(cell.seed)
    method = cell.method
    if method.after:
        return shrunk(bench, cell, kept(bench, replace(cell, method=DEFAULT)))
    if method.elastic:
        made = kept(bench, replace(cell, num_active=elastic_budgets(bench.budget.experts)[0]))
        set_active(made.model, cell.num_active)
        return Made(made.model, replace(made.spec, num_active=cell.num_active, elastic=()) if made.spec else None)
    return kept(bench, cell) if method == DEFAULT else trained(bench, cell)


def kept(bench: Bench, cell: Cell) -> Made:
    """The model of a distilled cell that others are made of, from the cache where it is there."""
    if cell.stage != "distilled":
        return trained(bench, cell)
    folder = Store(bench.setup.cache / "models", bench.budget, bench.data).path(cell).with_suffix("")
    if not folder.is_dir():
        made = trained(bench, cell)
        assert made.spec is not None
        fresh = folder.with_name(f".{folder.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        checkpoint.save(made.model, None, made.spec, fresh)
        fresh.replace(folder)
    return Made(checkpoint.load(folder), checkpoint.load_spec(folder))


def trained(bench: Bench, cell: Cell) -> Made:
    """The model of a cell up to its stage."""
    made = compressed(bench, cell) if cell.method.compressor else mixture(bench, cell)
    if cell.stage == "distilled":
        distil(bench, made, cell)
    return made


# --- without training ---------------------------------------------------------------------------------


def compressed(bench: Bench, cell: Cell) -> Made:
    """Another compressor at the FLOPs of the default's FFN and router."""
    assert cell.method.compressor is not None
    model, experts = bench.model(), bench.budget.experts
    inputs = [bench.inputs("calibration", index) for index in range(bench.num_layers)]
    compressors.compress(model, cell.method.compressor, inputs, cell.share(experts), num_experts=experts)
    return Made(model.eval(), None)


def mixture(bench: Bench, cell: Cell) -> Made:
    """Experts, and routers up to the cell's stage."""
    method, budget = cell.method, bench.budget
    recipe = RECIPES[method.recipe]
    student = bench.model()
    spec, layers = decomposed(bench, cell, student)
    of_texts, of_held_out = (
        texts_of_tokens(bench, kind) if spec.routing == "sequence" else {} for kind in ("router", "calibration")
    )
    routed = []
    for index, moe in enumerate(layers):
        x_TD, held_out_TD = bench.inputs("router", index), bench.held_out(index)
        if recipe.set_router is None:
            fit_router(
                moe,
                x_TD,
                RouterSettings(
                    steps=0 if cell.stage == "free" else budget.router_steps,
                    batch_tokens=budget.router_batch_tokens,
                    seed=cell.seed + index,
                    learning_rate=budget.router_learning_rate,
                    start=method.start,
                    ridge=budget.ridge,
                    objective=method.objective,
                    temperature=method.temperature,
                ),
                **of_texts,
            )
        else:
            recipe.set_router(moe)
        routed.append(oracle.diagnose(moe, held_out_TD, **{k: v[: len(held_out_TD)] for k, v in of_held_out.items()}))
        if recipe.set_router is None and method.refit and budget.refit:
            wanted_TD = outputs(read_ffn(bench.teacher, index), x_TD)
            refit_outputs(moe, x_TD, wanted_TD, penalty=budget.refit, route_TD=of_texts.get("route_TD"))
    install_moe(student, layers)
    return Made(student.eval(), spec, tuple(routed))


def texts_of_tokens(bench: Bench, kind: str) -> dict[str, Tensor]:
    """What routers of whole texts are fitted with: the text of each token, and what is read of it."""
    text_T = bench.text_of_token(kind)
    return {"text_T": text_T, "route_TD": text_means(bench.inputs(kind, 0), text_T)}


def decomposed(bench: Bench, cell: Cell, model: Any) -> tuple[MoESpec, list[MoEFFN]]:
    """Return the spec of a cell and the experts of every layer, by the method's partition."""
    method = cell.method
    ffns = [read_ffn(model, index) for index in range(bench.num_layers)]
    inputs = [bench.inputs("calibration", index) for index in range(bench.num_layers)]
    guarded = guard.guarded_neurons(ffns, inputs) if method.guard else []
    spec = spec_of_cell(bench, cell, model, ffns[0], at_least=max(map(len, guarded), default=0))
    partitions = partitions_of(bench, cell, inputs)
    layers = []
    for index, (ffn, x_TD) in enumerate(zip(ffns, inputs, strict=True)):
        shared_S = None
        if method.guard:
            width = spec.shape_of(index).shared_width
            shared_S = guard.shared_with_guard(ffn, x_TD, partitions[index], width, guarded[index])
        layers.append(decomposed_layer(bench, cell, spec, index, ffn, x_TD, partitions[index], shared_S))
    if method.active_per_layer == "budget":
        errors = [oracle.errors_by_active(moe, x_TD) for moe, x_TD in zip(layers, inputs, strict=True)]
        spec = replace(spec, active_per_layer=oracle.allocate(torch.stack(errors), spec.num_active))
        layers = [
            one_mixture(ffn, moe.neurons, moe.shared_neurons, spec, index)
            for index, (ffn, moe) in enumerate(zip(ffns, layers, strict=True))
        ]
    return spec, layers


def partitions_of(bench: Bench, cell: Cell, inputs: Sequence[Tensor]) -> list[Partition]:
    """Return the partition of each layer; `gradient` is bound to the gradients of the whole model."""
    row = PARTITIONS[cell.method.partition]
    if row is not gradient.ROW:
        return [row] * bench.num_layers
    gradients = gradient.output_gradients(
        bench.model(),
        bench.calibration(),
        head=bench.head,
        pooling=bench.pooling,
        max_tokens=bench.budget.calibration_tokens,
        seed=cell.seed,
    )
    return gradient.for_layers(inputs, gradients)


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
    kind = (spec.partition, spec.num_experts, shared_width, cell.method.guard, cell.seed, layer)
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
    """The spec of a cell's mixture: K of E experts, or K - 1 of them beside a shared expert that costs as much.

    The shared expert has `at_least` so many neurons.
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
        pooling=bench.pooling,
        max_length=bench.budget.max_length,
        shared_width=shared_width,
        gate=method.gate,
        selection=method.selection,
        routing=method.routing,
        elastic=tuple(others),
    )


def shrunk(bench: Bench, cell: Cell, made: Made) -> Made:
    """The same model with three quarters of its experts, by their use on the calibration texts."""
    assert cell.method.after is not None and made.spec is not None
    inputs, _ = seen(bench, made)
    border = len(inputs[0]) * 4 // 5
    spec, _ = shrink_model(
        made.model,
        made.spec,
        Tokens([x_TD[:border] for x_TD in inputs]),
        Tokens([x_TD[border:] for x_TD in inputs]),
        keep=kept_experts(bench.budget.experts),
        method=cell.method.after,
    )
    return Made(made.model.eval(), spec)


# --- what is found ------------------------------------------------------------------------------------


def ffn_errors(bench: Bench, made: Made, cell: Cell) -> dict[str, float]:
    """How far the FFNs are from dense, means over the layers, on texts that no router was trained on.

    `error` is that of the layers as they stand, ``||y - layer(x)|| / ||y||`` on the teacher's inputs, before any
    distillation. The others are `oracle.diagnose`'s: of a mixture whose experts are its own by then (distilled, made
    smaller, or at another of its budgets) on its own inputs and against all its experts together. A rival has none.
    """
    found: dict[str, float] = {}
    rows = [*made.routed]
    if cell.stage == "distilled" or not rows:
        rows = [] if made.spec is None else own_diagnoses(bench, made, made.spec)
    if cell.stage != "distilled" and (made.spec is None or made.spec.routing == "token"):
        found["error"] = sum(layer_errors(bench, made.model)) / bench.num_layers
    return found | {key: sum(row[key] for row in rows) / len(rows) for key in (rows[0] if rows else ())}


def own_diagnoses(bench: Bench, made: Made, spec: MoESpec) -> list[dict[str, float]]:
    """What `oracle.diagnose` says of each layer of a mixture on its own inputs."""
    inputs, text_T = seen(bench, made)
    of_texts = {"text_T": text_T, "route_TD": text_means(inputs[0], text_T)} if spec.routing == "sequence" else {}
    return [oracle.diagnose(moe, x_TD, **of_texts) for moe, x_TD in zip(moe_layers(made.model), inputs, strict=True)]


@torch.no_grad()
def layer_errors(bench: Bench, model: Any) -> list[float]:
    """``||y - layer(x)|| / ||y||`` of every layer on the teacher's inputs, y being the dense FFN's output."""
    errors = []
    for index, layer in enumerate(installed_ffns(model)):
        x_TD = bench.held_out(index)
        y_TD = outputs(read_ffn(bench.teacher, index), x_TD)
        errors.append(((y_TD - layer(x_TD)).norm() / y_TD.norm()).item())
    return errors


def seen(bench: Bench, made: Made) -> tuple[list[Tensor], Tensor]:
    """What the mixtures of a model see of the texts that errors are measured on, and the text of each token."""
    tokens = bench.budget.held_out_tokens
    inputs = layer_inputs(made.model, bench.calibration(), max_tokens=tokens, device=bench.setup.device)
    made.model.to("cpu")
    return inputs, bench.text_of_token("calibration")[:tokens]


def cost_of(bench: Bench, made: Made, errors: dict[str, float]) -> dict[str, float]:
    """What a token runs of the dense model's FFNs and of the whole, as shares of their FLOPs.

    `active_share` counts neurons, as many as the tokens were seen to use; `ffn_flops` the router, too.
    """
    config, length = bench.teacher.config, bench.budget.max_length
    if made.spec is None:
        dense, _ = metrics.flops_per_token(bench.dense_spec, config, length)
        ours = sum(one.flops() for one in made.model.modules() if isinstance(one, CompressedFFN))
        return {
            "active_share": ours / dense.ffn,
            "ffn_flops": ours / dense.ffn,
            "flops": (dense.total - dense.ffn + ours) / dense.total,
        }
    dense, mixed = metrics.flops_per_token(made.spec, config, length)
    (shape,) = made.spec.stacks
    active_share = (shape.shared_width + errors["mean_active"] * shape.expert_width) / shape.ffn_width
    return {
        "active_share": active_share,
        "ffn_flops": active_share + mixed.router / dense.ffn,
        "flops": (dense.total - dense.ffn + mixed.router) / dense.total + active_share * dense.ffn / dense.total,
    }
