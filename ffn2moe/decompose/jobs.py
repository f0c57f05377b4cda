"""Jobs on single layers for `ffn2moe.decompose.layer_map`: partition, judgement, widths, router.

A function `..._job` makes a job; a function `do_...` does it in a worker.
"""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from ffn2moe.decompose import oracle
from ffn2moe.decompose.budget import errors_by_active
from ffn2moe.decompose.layer import decompose_layer, mixture
from ffn2moe.decompose.layer_map import LayerJob, LayerResult
from ffn2moe.decompose.partition import PARTITIONS
from ffn2moe.decompose.parts import dense_of, dense_parts, mixture_of, mixture_parts
from ffn2moe.decompose.route import RouterSettings, route_layer
from ffn2moe.decompose.width_costs import costs, moments_of
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec

PROVISIONAL_TOKENS = 1024  # that judge a partition which the fit of the routers fills anew


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


# --- partition ----------------------------------------------------------------------------------------------------


def decompose_job(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    every_budget: bool,
) -> LayerJob:
    """Make the job that partitions the neurons of a layer (`decompose_layer`) and judges the partition.

    It is judged by the oracle's error with the K experts of the spec, or with `every_budget` for K = 1 to E.
    """
    settings = {"activation": ffn.activation, "spec": spec.to_dict(), "seed": seed, "every_budget": every_budget}
    return LayerJob("decompose", layer, settings, {**dense_parts(ffn), "x_TD": x_TD})


def do_decompose(job: LayerJob) -> LayerResult:
    """Return the partition, `neurons` [E, M] and `shared_neurons` [S], with `errors_E` [E] or the oracle's summary."""
    ffn, x_TD, spec = dense_of(job), job.tensors["x_TD"], MoESpec.from_dict(job.settings["spec"])
    moe = decompose_layer(ffn, x_TD, spec, job.layer, seed=job.settings["seed"])
    found = {"neurons": moe.neurons, "shared_neurons": moe.shared_neurons}
    if job.settings["every_budget"]:
        return LayerResult(job.layer, {}, {**found, "errors_E": errors_by_active(moe, x_TD)})
    method = PARTITIONS.get(spec.partition)  # a worker need not know one of the ablation
    judged_TD = x_TD[:PROVISIONAL_TOKENS] if method is not None and method.refilled else x_TD
    return LayerResult(job.layer, _oracle_summary(moe, judged_TD), found)


def judge_job(
    ffn: DenseFFN,
    neurons_EM: Tensor,
    shared_S: Tensor,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
) -> LayerJob:
    """Make the job that judges a given partition by the oracle's error with the K of the spec for this layer."""
    settings = {"activation": ffn.activation, "spec": spec.to_dict()}
    more = _present(neurons=neurons_EM, shared_neurons=shared_S)
    return LayerJob("judge", layer, settings, {**dense_parts(ffn), "x_TD": x_TD, **more})


def do_judge(job: LayerJob) -> LayerResult:
    """Return the summary: `oracle_error`, and the best `scale`."""
    spec = MoESpec.from_dict(job.settings["spec"])
    moe = mixture(dense_of(job), job.tensors["neurons"], job.tensors["shared_neurons"], spec, job.layer)
    return LayerResult(job.layer, _oracle_summary(moe, job.tensors["x_TD"]))


def _oracle_summary(moe: MoEFFN, x_TD: Tensor) -> dict[str, float]:
    best = oracle.best_scale(moe, x_TD)
    return {"oracle_error": float(best.error), "scale": float(best.scale)}


# --- widths -------------------------------------------------------------------------------------------------------


def widths_job(ffn: DenseFFN, x_TD: Tensor, fisher_DD: Tensor, layer: int) -> LayerJob:
    """Make the job that finds what each width of a layer's FFN costs (`width_costs.costs`)."""
    tensors = {**dense_parts(ffn), "x_TD": x_TD, "fisher_DD": fisher_DD}
    return LayerJob("widths", layer, {"activation": ffn.activation}, tensors)


def do_widths(job: LayerJob) -> LayerResult:
    """Return `costs_N`, the cost of each width in nats a token."""
    ffn, x_TD = dense_of(job), job.tensors["x_TD"]
    costs_N = costs(ffn, moments_of(ffn, x_TD), job.tensors["fisher_DD"]) / len(x_TD)
    return LayerResult(job.layer, {}, {"costs_N": costs_N})


# --- router -------------------------------------------------------------------------------------------------------


def route_job(
    moe: MoEFFN,
    spec: MoESpec,
    layer: int,
    settings: RouterSettings,
    *,
    x_TD: Tensor,
    held_out_TD: Tensor,
    widths: tuple[int, int] | None = None,
    fisher_DD: Tensor | None = None,
) -> LayerJob:
    """Make the job of `route_layer` on a decomposed layer; the arguments are its own."""
    more = _present(x_TD=x_TD, held_out_TD=held_out_TD, fisher_DD=fisher_DD)
    tensors = {**mixture_parts(moe), **more}
    settings_ = {"spec": spec.to_dict(), "router": asdict(settings), "widths": widths and list(widths)}
    return LayerJob("route", layer, settings_, tensors)


def do_route(job: LayerJob) -> LayerResult:
    """Return the tensors of the routed mixture; the summary holds `losses` and `row` of `route_layer`."""
    moe, widths = mixture_of(job), job.settings["widths"]
    found = route_layer(
        moe,
        job.tensors["x_TD"],
        RouterSettings(**job.settings["router"]),
        partition=job.settings["spec"]["partition"],
        held_out_TD=job.tensors["held_out_TD"],
        widths=widths and tuple(widths),
        fisher_DD=job.tensors.get("fisher_DD"),
    )
    return LayerResult(job.layer, {"losses": found.losses, "row": found.row}, dict(moe.state_dict()))
