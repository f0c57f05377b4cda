"""Route one decomposed layer: fit its router, judge it on held-out tokens, refit the experts' outputs.

The stages (through `jobs`), `convert` and `stream` all do this with `route_layer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ffn2moe.decompose import oracle, token_experts
from ffn2moe.decompose.evidence import Grams, RouterData
from ffn2moe.decompose.layer import dense_ffn, outputs
from ffn2moe.decompose.objectives import OBJECTIVES, RouterObjective
from ffn2moe.decompose.oracles import ORACLES
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.reconstruct import refit_outputs, relative_error
from ffn2moe.decompose.router_fit import train_router
from ffn2moe.decompose.starts import STARTS, RouterStart
from ffn2moe.moe import fit
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.numerics import chunk_of


@dataclass(frozen=True)
class RouterSettings:
    """Say how to fit the router of a layer, and the outputs of its experts."""

    steps: int  # AdamW steps after the start; 0 = the start alone
    batch_tokens: int  # tokens that a step reads
    seed: int
    learning_rate: float = 1e-2
    start: str = "ridge"  # a row of STARTS
    ridge: float = 1e-2  # penalty of the start `ridge`, relative to the mean feature variance
    objective: str = "oracle"  # a row of OBJECTIVES: the loss of the steps
    temperature: float = 1.0  # divides the scores at the first step; 1 at the last
    refit: float = 1e-2  # penalty of `reconstruct.refit_outputs`; 0 = leave the experts as they are

    def for_layer(self, layer: int) -> RouterSettings:
        """Return the settings with the seed of one layer."""
        return replace(self, seed=self.seed + layer)


@dataclass(frozen=True)
class Routing:
    """Hold the findings of `route_layer`."""

    losses: list[float]  # one a step
    row: dict[str, float]  # `oracle.diagnose` on held-out tokens, `scale`, and after a refit `refit_error`


def route_layer(
    moe: MoEFFN,
    x_TD: Tensor,
    settings: RouterSettings,
    *,
    partition: str | None = None,
    held_out_TD: Tensor | None = None,
    widths: tuple[int, int] | None = None,
    fisher_DD: Tensor | None = None,
) -> Routing:
    """Fit the router of a decomposed layer in place, judge it, and refit the experts' outputs to the dense FFN.

    `moe` comes from `decompose_layer`: its experts are still slices of the dense FFN. The router and the outputs are
    fitted on tokens `x_TD` [T, D]; `held_out_TD` judges them (None: `x_TD` itself). The experts are filled anew where
    `partition`, a name in PARTITIONS, says so, then M and S neurons wide for `widths` (None: as wide as they are) and
    with neurons chosen under the weights `fisher_DD` [D, D].
    """
    held_out_TD = x_TD if held_out_TD is None else held_out_TD
    method = None if partition is None else PARTITIONS.get(partition)  # a worker need not know one of the ablation
    if method is not None and method.refilled:
        ffn = dense_ffn(moe)
        losses = token_experts.fill(moe, ffn, x_TD, outputs(ffn, x_TD), settings, widths, fisher_DD)
        return Routing(losses, token_experts.judge(moe, held_out_TD, outputs(ffn, held_out_TD)))
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    bias_D = None if moe.b_out is None else moe.b_out.detach().clone()  # before the fit of the router changes it
    found = oracle.survey(moe, x_TD, chunk)
    losses = fit_rows(RouterData(moe, x_TD, x_TD, found, chunk), settings)
    held_out = oracle.grams(moe, held_out_TD, chunk, keep_sum=True)
    figures = oracle.diagnose_by(moe, held_out, held_out_TD, chunk)
    row = {name: float(value) for name, value in figures.items()} | {"scale": moe.output_scale.item()}
    if settings.refit:
        chunk = chunk_of(moe.neurons.numel())
        wanted_TD = _dense(moe, x_TD, found.grams, bias_D)
        judged_TD = _dense(moe, held_out_TD, held_out, bias_D)  # before the refit changes the shared expert
        refit_outputs(moe, x_TD, wanted_TD, penalty=settings.refit, chunk=chunk)
        row["refit_error"] = relative_error(moe, held_out_TD, judged_TD, chunk)
    return Routing(losses, row)


@torch.no_grad()
def _dense(moe: MoEFFN, x_TD: Tensor, found: Grams, bias_D: Tensor | None) -> Tensor:
    """Return the dense FFN's output on tokens [T, D] from the experts' sum, which is lost, and the output bias."""
    dense_TD = found.routed_TD
    assert dense_TD is not None, "the sum was kept"
    for rows in torch.arange(len(x_TD)).split(chunk_of(moe.neurons.numel())):
        shared = moe.shared(x_TD[rows])
        if shared is not None:
            dense_TD[rows] += shared
    return dense_TD if bias_D is None else dense_TD.add_(bias_D)


def fit_router(moe: MoEFFN, x_TD: Tensor, settings: RouterSettings) -> list[float]:
    """Fit a layer's router in place on tokens [T, D], then its scale and mean to the router; return each step's loss.

    The fit starts from `settings.start` and takes AdamW steps on `settings.objective`. No expert changes. Where the
    selection leaves the number of experts open, the mean number is calibrated to K. ValueError for a start or an
    objective that does not fit the selection.
    """
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    return fit_rows(RouterData(moe, x_TD, x_TD, oracle.survey(moe, x_TD, chunk), chunk), settings)


def fit_rows(data: RouterData, settings: RouterSettings) -> list[float]:
    """Fit a layer's router in place on rows: tokens, or groups of tokens that share a choice. See `fit_router`."""
    moe, x_TD, read_RD = data.moe, data.x_TD, data.read_RD
    start, objective = STARTS[settings.start], OBJECTIVES[settings.objective]
    _require_fit(moe, settings, start, objective)
    with torch.no_grad():
        moe.router.set(*start.weights(data, settings.ridge))
        phases = objective.phases(data)
    with torch.enable_grad():
        losses = list(
            train_router(
                moe.router,
                read_RD,
                phases,
                steps=settings.steps,
                batch_rows=max(1, settings.batch_tokens * len(read_RD) // len(x_TD)),
                learning_rate=settings.learning_rate,
                seed=settings.seed,
                temperature=settings.temperature,
            )
        )
    _calibrate(data)
    return losses


def _require_fit(moe: MoEFFN, settings: RouterSettings, start: RouterStart, objective: RouterObjective) -> None:
    if not ORACLES[moe.router.selection].rates_numbers:
        return
    for what, name, row, table in (
        ("start", settings.start, start, STARTS),
        ("objective", settings.objective, objective, OBJECTIVES),
    ):
        if row.single_experts:
            able = [one for one, other in table.items() if not other.single_experts]
            raise ValueError(
                f"{what} {name!r} rates single experts, and with selection {moe.router.selection!r} a score rates a "
                f"number of experts: use {what} {' or '.join(able)}"
            )


def _calibrate(data: RouterData) -> None:
    """Set the number of experts, the spread of the gates, the scale and the mean to what the router does."""
    moe, x_TD = data.moe, data.x_TD
    fit.calibrate(moe, x_TD)
    fit.fit_router_scale(moe, x_TD[: data.chunk])  # one number, so a part of the tokens will do
    if moe.b_out is None:
        oracle.fit_scales(moe, data.survey.grams, data.read_RD)
    else:
        fit.fit_scale_and_mean(moe, x_TD, data.chunk, whole_TD=data.survey.grams.routed_TD)
