"""Make the model of a cell and measure it."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.ablation import compressors
from benchmarks.ablation.bench import Bench
from benchmarks.ablation.findings import cost_of, ffn_errors, own_inputs
from benchmarks.ablation.grid import Cell, Store
from benchmarks.ablation.method import DEFAULT, elastic_budgets, kept_experts
from benchmarks.ablation.mixture import mixture
from benchmarks.ablation.recipes import Made, distil
from ffn2moe.moe import checkpoint
from ffn2moe.moe.layer import set_active
from ffn2moe.shrinking.model import shrink_model
from ffn2moe.shrinking.usage import Tokens


def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Make and judge a cell; return figures, kept shares, FFN errors, cost and seconds.

    `made` and `judged` are seconds on the clock. `processor` is the time of the process itself, which other work on the
    machine does not change.
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
    """Return the model of a cell, in eval mode."""
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
    """Return the model of a cell that others start from: a distilled one comes from the cache, if it is there."""
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
    """Return the model of a cell up to its stage."""
    made = compressed(bench, cell) if cell.method.compressor else mixture(bench, cell)
    if cell.stage == "distilled":
        distil(bench, made, cell)
    return made


def compressed(bench: Bench, cell: Cell) -> Made:
    """Return the model of another compressor, at the FLOPs of the default's FFN and router."""
    assert cell.method.compressor is not None
    model, experts = bench.model(), bench.budget.experts
    inputs = [bench.inputs("calibration", index) for index in range(bench.num_layers)]
    compressors.compress(model, cell.method.compressor, inputs, cell.share(experts), num_experts=experts)
    return Made(model.eval(), None)


def shrunk(bench: Bench, cell: Cell, made: Made) -> Made:
    """Return the model with three quarters of its experts, by their use on the calibration texts."""
    assert cell.method.after is not None and made.spec is not None
    inputs, _ = own_inputs(bench, made)
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
