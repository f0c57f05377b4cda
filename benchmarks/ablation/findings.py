"""What the grid measures of a model besides its figures: the errors of its FFNs and its cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.bench import Bench
from benchmarks.ablation.grid import Cell
from benchmarks.ablation.linear_maps import CompressedFFN
from benchmarks.ablation.recipes import RECIPES, Made
from ffn2moe import metrics
from ffn2moe.choices import ROUTINGS
from ffn2moe.decompose import oracle
from ffn2moe.decompose.inputs import layer_inputs
from ffn2moe.decompose.layer import outputs
from ffn2moe.dense.blocks import installed_ffns
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe.layer import moe_layers


def ffn_errors(bench: Bench, made: Made, cell: Cell) -> dict[str, float]:
    """Return the distance of the FFNs from dense, means over the layers, on texts that no router was trained on.

    `error` is ``||y - layer(x)|| / ||y||`` on the teacher's inputs, before any distillation. The others come from
    `oracle.diagnose`. A mixture that was distilled, made smaller or switched to another K no longer sums to the dense
    FFN: it is judged on its own inputs, against all of its experts together. Another compressor has none of them.
    """
    found: dict[str, float] = {}
    rows = [*made.routed]
    if cell.stage == "distilled" or not rows:
        rows = [] if made.spec is None else own_diagnoses(bench, made, cell)
    if cell.stage != "distilled" and (made.spec is None or ROUTINGS[made.spec.routing].own_input):
        found["error"] = sum(layer_errors(bench, made.model)) / bench.num_layers
    return found | {key: sum(row[key] for row in rows) / len(rows) for key in (rows[0] if rows else ())}


def own_diagnoses(bench: Bench, made: Made, cell: Cell) -> list[dict[str, float]]:
    """Return `oracle.diagnose` of each layer of a mixture on its own inputs."""
    inputs, text_T = own_inputs(bench, made)
    layers = zip(moe_layers(made.model), inputs, strict=True)
    judge = RECIPES[cell.method.recipe].diagnose_own
    if judge is not None:
        return [judge(moe, x_TD, inputs[0], text_T) for moe, x_TD in layers]
    return [oracle.diagnose(moe, x_TD) for moe, x_TD in layers]


@torch.no_grad()
def layer_errors(bench: Bench, model: Any) -> list[float]:
    """Return ``||y - layer(x)|| / ||y||`` of every layer on the teacher's inputs; y is the dense FFN's output."""
    errors = []
    for index, layer in enumerate(installed_ffns(model)):
        x_TD = bench.held_out(index)
        y_TD = outputs(read_ffn(bench.teacher, index), x_TD)
        errors.append(((y_TD - layer(x_TD)).norm() / y_TD.norm()).item())
    return errors


def own_inputs(bench: Bench, made: Made) -> tuple[list[Tensor], Tensor]:
    """Return the inputs of the model's mixtures on the texts that errors are measured on, and each token's text."""
    tokens = bench.budget.held_out_tokens
    inputs = layer_inputs(made.model, bench.calibration(), max_tokens=tokens, device=bench.setup.device)
    made.model.to("cpu")
    return inputs, bench.text_of_token("calibration")[:tokens]


def cost_of(bench: Bench, made: Made, errors: dict[str, float]) -> dict[str, float]:
    """Return the FLOPs of a token as shares of those of the dense model's FFNs and of the whole.

    `active_share` counts the neurons that the tokens used; `ffn_flops` adds the router.
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
