"""Work on one layer, as jobs for `ffn2moe.decompose.layer_map`: statistics, partition, router.

The functions that begin with `to_` make a job, those after them do it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ffn2moe.decompose import oracle
from ffn2moe.decompose.layer import carve, fit_router, largest_contributions, mixture, outputs
from ffn2moe.decompose.layer_map import LayerJob, LayerResult, under
from ffn2moe.decompose.reconstruct import refit_outputs, relative_error
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.spec import MoESpec


def dense_parts(ffn: DenseFFN) -> dict[str, Tensor]:
    """The tensors of a dense FFN under names of a job."""
    return {f"dense.{name}": value for name, value in vars(ffn).items() if isinstance(value, Tensor)}


def dense_of(job: LayerJob) -> DenseFFN:
    """The dense FFN of a job, whose settings name the activation."""
    return DenseFFN(activation=job.settings["activation"], **under("dense.", job.tensors))


def mixture_parts(moe: MoEFFN) -> dict[str, Tensor]:
    """The tensors of a mixture under names of a job."""
    return {f"ffn.{name}": tensor for name, tensor in moe.state_dict().items()}


def mixture_of(job: LayerJob) -> MoEFFN:
    """The mixture of a job, whose settings hold the spec."""
    spec, tensors = MoESpec.from_dict(job.settings["spec"]), under("ffn.", job.tensors)
    biases = {name: name in tensors for name in ("b_in", "b_out", "b_gate")}
    moe = MoEFFN(spec, job.layer, **biases)
    moe.load_state_dict(tensors)
    return moe.eval()


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


# --- statistics ---------------------------------------------------------------------------------------------------


def to_contribute(ffn: DenseFFN, x_TD: Tensor, layer: int) -> LayerJob:
    """The most that each neuron adds to the output on tokens [T, D] (`factorise.largest_contributions`)."""
    return LayerJob("contributions", layer, {"activation": ffn.activation}, {**dense_parts(ffn), "x_TD": x_TD})


def contributions(job: LayerJob) -> LayerResult:
    """`largest_F` [F]."""
    return LayerResult(job.layer, {}, {"largest_F": largest_contributions(dense_of(job), job.tensors["x_TD"])})


# --- partition ----------------------------------------------------------------------------------------------------


def to_carve(
    ffn: DenseFFN,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    seed: int,
    weigh: bool,
    gradient_TD: Tensor | None = None,
    guarded: Tensor | None = None,
    text_T: Tensor | None = None,
) -> LayerJob:
    """Divide the neurons (`factorise.carve`); then what the oracle loses with K experts or, to `weigh`, with any."""
    settings = {"activation": ffn.activation, "spec": spec.to_dict(), "seed": seed, "weigh": weigh}
    more = _given(gradient_TD=gradient_TD, guarded=guarded, text_T=text_T)
    return LayerJob("carve", layer, settings, {**dense_parts(ffn), "x_TD": x_TD, **more})


def carving(job: LayerJob) -> LayerResult:
    """The partition: `neurons` [E, M], `shared_neurons` [S]; `errors_E` [E] or else what `judgement` tells."""
    ffn, x_TD, text_T = dense_of(job), job.tensors["x_TD"], job.tensors.get("text_T")
    moe = carve(
        ffn,
        x_TD,
        MoESpec.from_dict(job.settings["spec"]),
        job.layer,
        seed=job.settings["seed"],
        gradient_TD=job.tensors.get("gradient_TD"),
        guarded=job.tensors.get("guarded"),
    )
    found = {"neurons": moe.neurons, "shared_neurons": moe.shared_neurons}
    if job.settings["weigh"]:
        return LayerResult(job.layer, {}, {**found, "errors_E": oracle.errors_by_active(moe, x_TD, text_T=text_T)})
    return LayerResult(job.layer, _judged(moe, x_TD, text_T), found)


def to_judge(
    ffn: DenseFFN,
    neurons_EM: Tensor,
    shared_S: Tensor,
    x_TD: Tensor,
    spec: MoESpec,
    layer: int,
    *,
    text_T: Tensor | None = None,
) -> LayerJob:
    """What the oracle loses with the K experts that the spec gives the layer, under a partition that is known."""
    settings = {"activation": ffn.activation, "spec": spec.to_dict()}
    more = _given(neurons=neurons_EM, shared_neurons=shared_S, text_T=text_T)
    return LayerJob("judge", layer, settings, {**dense_parts(ffn), "x_TD": x_TD, **more})


def judgement(job: LayerJob) -> LayerResult:
    """`oracle_error`, and the `scale` at which it is least."""
    spec = MoESpec.from_dict(job.settings["spec"])
    moe = mixture(dense_of(job), job.tensors["neurons"], job.tensors["shared_neurons"], spec, job.layer)
    return LayerResult(job.layer, _judged(moe, job.tensors["x_TD"], job.tensors.get("text_T")))


def _judged(moe: MoEFFN, x_TD: Tensor, text_T: Tensor | None) -> dict[str, float]:
    best = oracle.best_scale(moe, x_TD, text_T=text_T)
    return {"oracle_error": float(best.error), "scale": float(best.scale)}


# --- router -------------------------------------------------------------------------------------------------------


def to_route(
    moe: MoEFFN,
    ffn: DenseFFN,
    spec: MoESpec,
    layer: int,
    *,
    train_TD: Tensor,
    held_out_TD: Tensor,
    train_texts: dict[str, Tensor],
    held_out_texts: dict[str, Tensor],
    refit: float,
    **settings: Any,
) -> LayerJob:
    """Train the router (`factorise.fit_router`, which `settings` are for), judge it, and fit the experts' outputs.

    Trained on the tokens `train_TD` [T, D] and judged on those held out; texts as `fit_router` and `oracle.diagnose`
    take them. `refit` is the penalty of `reconstruct.refit_outputs`; 0 leaves the experts as they are.
    """
    tensors = {**mixture_parts(moe), **dense_parts(ffn), "train_TD": train_TD, "held_out_TD": held_out_TD}
    tensors |= {f"train.{name}": tensor for name, tensor in train_texts.items()}
    tensors |= {f"held_out.{name}": tensor for name, tensor in held_out_texts.items()}
    about = {"activation": ffn.activation, "spec": spec.to_dict(), "refit": refit, "fit": settings}
    return LayerJob("route", layer, about, tensors)


def routing(job: LayerJob) -> LayerResult:
    """The mixture's tensors; the `losses` of each step, and the `row` of what was found on the tokens held out."""
    moe, train_TD, held_out_TD = mixture_of(job), job.tensors["train_TD"], job.tensors["held_out_TD"]
    train_texts, held_out_texts = job.under("train."), job.under("held_out.")
    losses = fit_router(moe, train_TD, **job.settings["fit"], **train_texts)
    found = oracle.diagnose(moe, held_out_TD, **held_out_texts)
    row = {name: float(value) for name, value in found.items()} | {"scale": moe.output_scale.item()}
    if job.settings["refit"]:
        ffn = dense_of(job)
        wanted_TD = outputs(ffn, train_TD)
        refit_outputs(moe, train_TD, wanted_TD, penalty=job.settings["refit"], route_TD=train_texts.get("route_TD"))
        wanted_TD = outputs(ffn, held_out_TD)
        row["refit_error"] = relative_error(moe, held_out_TD, wanted_TD, held_out_texts.get("route_TD"))
    return LayerResult(job.layer, {"losses": losses, "row": row}, dict(moe.state_dict()))
