"""After conversion: fit a mixture to one task, with fewer experts.

Routers prefer some experts on the texts of a task (PreMoe, arXiv 2505.17639). What becomes of the others, per layer:

- ``drop``: they go (PreMoe). Smaller; a token costs what it did. With selection `prefix` the last blocks go.
- ``regroup``: their neurons go to the kept experts (DERN, arXiv 2509.10377), each to where the tokens that used it go
  now. Carved neurons keep their identity, so none are merged, as DERN does to keep the width: experts get wider, and
  all neurons stay.
- ``merge``: each kept expert takes the mean of its group, weighted by use, after their neurons were matched (MC-SMoE,
  arXiv 2310.01334; UNCURL, arXiv 2409.01483). Smaller; a token costs what it did.

Then scale, output bias and output matrices are fitted in closed form so that each layer gives on the task's tokens what
it gave before.
Letters as in `ffn2moe.spec`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.choices import ROUTINGS, SELECTIONS
from ffn2moe.data.batches import Batch, in_order
from ffn2moe.data.corpus import read_corpus
from ffn2moe.decompose.inputs import chunk_of, layer_inputs, texts_of
from ffn2moe.decompose.reconstruct import refit_outputs
from ffn2moe.decompose.starts.ridge import ridge
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.dense.locate import install
from ffn2moe.moe import checkpoint
from ffn2moe.moe.experts import ExpertWeights
from ffn2moe.moe.fit import calibrate
from ffn2moe.moe.layer import MoEFFN, moe_layers
from ffn2moe.moe.texts import text_means
from ffn2moe.numerics import WIDEST_MOMENTS, choose_device
from ffn2moe.spec import MoESpec, Shrinking

HELD_OUT = 5  # every fifth text is held out to judge by
BATCH_TEXTS = 16
PENALTY = 0.1  # of the output matrices' fit: best at 500, 2,000 and 9,000 tokens of MiniLM (of 0.01, 0.1 and 1)
GROUP_RIDGE = 1e-2  # of the fit of a merged expert's score to the highest of its group


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. Errors are relative, ``||y - y'|| / ||y'||`` over the tokens that were held out."""

    layer: int
    use: tuple[float, ...]  # of every expert before: the sum of its gates over the task's tokens
    kept: tuple[int, ...]  # of the experts before
    covered: float  # share of the use that the kept experts had
    error_before: float  # of the layer, against the sum of all its experts
    error_after: float  # of what it is now, against the same
    change: float  # of what it is now, against what it was


@dataclass(frozen=True)
class Tokens:
    """What the layers of a model see of some texts: the input [T, D] of each, and what their routers read of it."""

    inputs: Sequence[Tensor]
    route_TD: Tensor | None = None  # with routing `sequence`: the means of the tokens' texts


def see(model: Any, spec: MoESpec, batches: Sequence[Batch], max_tokens: int, device: str = "cpu") -> Tokens:
    """Run texts through a model and keep what its mixtures see, at most `max_tokens` tokens."""
    inputs = layer_inputs(model, batches, max_tokens=max_tokens, device=device)
    model.to("cpu")
    if ROUTINGS[spec.routing].own_input:
        return Tokens(inputs)
    return Tokens(inputs, text_means(inputs[0], texts_of(batches, max_tokens)))


@torch.no_grad()
def usage(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None = None) -> Tensor:
    """How much tokens [T, D] use each expert: the sum of its gates, float64 [E]; with unit gates, their number."""
    use_E = torch.zeros(moe.num_experts, dtype=torch.float64)
    for x, route in _chunks(moe, x_TD, route_TD):
        scores_TE = moe.scores(x, route)
        choice = moe.router.choose(scores_TE, moe.num_active)
        gate_TK = moe.router.weigh(scores_TE, choice).double()
        use_E.index_add_(0, choice.experts_TK.flatten(), gate_TK.flatten())
    return use_E


def most_used(use_E: Tensor, keep: int) -> Tensor:
    """The experts to keep, in order, [K]; of two that are used alike the first."""
    return use_E.argsort(descending=True, stable=True)[:keep].sort().values


def require_shrinkable(spec: MoESpec, keep: int, method: str) -> None:
    """ValueError, with cause and remedy, where a mixture cannot be left with `keep` experts by this method."""
    if method not in get_args(Shrinking):
        raise ValueError(f"there is no method {method!r}; there are: {', '.join(get_args(Shrinking))}")
    if len(spec.stacks) != 1:
        raise ValueError(
            f"a {spec.family} model has {len(spec.stacks)} stacks of layers, and experts are counted in one: models "
            "with an encoder and a decoder, or two towers, stay as they are"
        )
    if keep >= spec.num_experts:
        raise ValueError(
            f"keep = {keep} leaves nothing to take away, as the model has {spec.num_experts} experts: keep fewer"
        )
    most = max((spec.num_active, *spec.active_per_layer))
    if keep < most:
        raise ValueError(
            f"keep = {keep} is fewer than the {most} experts that a token uses: keep at least {most}, or convert with "
            "fewer active experts"
        )
    if SELECTIONS[spec.selection].ordered and method != "drop":
        raise ValueError(
            f"with selection {spec.selection} experts are blocks in order of importance, and {method} would mix the "
            "order: use drop, which takes the last blocks away"
        )


@torch.no_grad()
def shrink_model(
    model: Any,
    spec: MoESpec,
    task: Tokens,
    held_out: Tokens,
    *,
    keep: int,
    method: Shrinking,
    track: Callable[[Sequence[MoEFFN], int, str], Iterable[MoEFFN]] = lambda items, total, what: items,
) -> tuple[MoESpec, list[LayerReport]]:
    """Leave every layer of a mixture, in place, with `keep` of its experts; gives its new spec and what became of each.

    `task` is what the layers see of the task's texts, `held_out` the same of texts to judge by; both of the model as it
    is. ValueError where that is not possible (`require_shrinkable`).
    """
    require_shrinkable(spec, keep, method)
    layers = moe_layers(model)
    width = layers[0].w_in.shape[1]
    if method == "regroup":
        width = max(-(-int((moe.neurons >= 0).sum()) // keep) for moe in layers)
    smaller = replace(
        spec,
        num_experts=keep,
        stacks=(replace(spec.stacks[0], expert_width=width),),
        max_active=None if spec.max_active is None else min(spec.max_active, keep),
        elastic=tuple(active for active in spec.elastic if active <= keep),
        container=None,  # no native container is written
        shrunk=method,
    )
    reports = []
    for layer, moe in enumerate(track(layers, len(layers), "shrinking layers")):
        x_TD = task.inputs[layer]
        use_E = usage(moe, x_TD, task.route_TD)
        kept_K = torch.arange(keep) if SELECTIONS[spec.selection].ordered else most_used(use_E, keep)
        made = {"drop": _dropped, "regroup": _regrouped, "merge": _merged}[method](
            moe, smaller, layer, kept_K, use_E, x_TD, task.route_TD
        ).eval()
        made.texts = moe.texts
        imitate(made, moe, x_TD, task.route_TD)
        errors = _errors(moe, made, held_out.inputs[layer], held_out.route_TD)
        covered = (use_E[kept_K].sum() / use_E.sum()).item()
        reports.append(LayerReport(layer, tuple(use_E.tolist()), tuple(kept_K.tolist()), covered, *errors))
        install(model, layer, made)
    return smaller, reports


def _chunks(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None) -> Iterable[tuple[Tensor, Tensor | None]]:
    chunk = chunk_of(moe.num_experts * x_TD.shape[1])
    for start in range(0, len(x_TD), chunk):
        rows = slice(start, start + chunk)
        yield x_TD[rows], None if route_TD is None else route_TD[rows]


# --- the methods -----------------------------------------------------------------------------------------------------


def _gathered(moe: MoEFFN, spec: MoESpec, layer: int, places_KM: Tensor) -> MoEFFN:
    """A layer of other experts made of the same neurons: at each place the neuron e * M + m of the old, -1 for none."""
    present_KM = places_KM >= 0

    def taken(stacked_EM: Tensor | None) -> Tensor | None:  # [E, M, ...] -> [K, M', ...]
        if stacked_EM is None:
            return None
        found = stacked_EM.flatten(0, 1)[places_KM.clamp(min=0)]
        found[~present_KM] = 0
        return found

    w_in_KMD, w_out_KMD = taken(moe.w_in), taken(moe.w_out.transpose(1, 2))
    assert w_in_KMD is not None and w_out_KMD is not None
    weights = ExpertWeights(
        w_in_KMD,
        w_out_KMD.transpose(1, 2).contiguous(),
        taken(moe.b_in),
        moe.b_out,
        taken(moe.w_gate),
        taken(moe.b_gate),
        _shared(moe),
    )
    neurons_KM = moe.neurons.flatten()[places_KM.clamp(min=0)].masked_fill(~present_KM, -1)
    return MoEFFN.from_experts(spec, weights, neurons_KM, layer, moe.shared_neurons)


def _shared(moe: MoEFFN) -> DenseFFN | None:
    if moe.shared_in is None or moe.shared_out is None:
        return None
    return DenseFFN(
        moe.shared_in,
        moe.shared_out,
        moe.activation,
        b_in_F=moe.shared_b_in,
        w_gate_FD=moe.shared_gate,
        b_gate_F=moe.shared_b_gate,
    )


def _take_router(made: MoEFFN, moe: MoEFFN, kept_K: Tensor) -> None:
    """The rows of the kept experts, and all else of the router; and the scales, to begin with."""
    made.router.weight.copy_(moe.router.weight[kept_K])
    made.router.bias.copy_(moe.router.bias[kept_K])
    made.router.balance_bias.copy_(moe.router.balance_bias[kept_K])
    made.router.scale.copy_(moe.router.scale)
    for name in moe.router.rule.buffers:
        made.router.get_buffer(name).copy_(moe.router.get_buffer(name))
    made.output_scale.copy_(moe.output_scale)
    for active, scale in made.elastic_scale.items():
        scale.copy_(moe.elastic_scale[active])


def _places(moe: MoEFFN) -> Tensor:
    """The number of every place, [E, M]; -1 where padding stands."""
    return torch.arange(moe.neurons.numel()).view_as(moe.neurons).masked_fill(moe.neurons < 0, -1)


def _dropped(
    moe: MoEFFN, spec: MoESpec, layer: int, kept_K: Tensor, use_E: Tensor, x_TD: Tensor, route_TD: Tensor | None
) -> MoEFFN:
    made = _gathered(moe, spec, layer, _places(moe)[kept_K])
    _take_router(made, moe, kept_K)
    calibrate(made, x_TD, route_TD)
    return made


def _regrouped(
    moe: MoEFFN, spec: MoESpec, layer: int, kept_K: Tensor, use_E: Tensor, x_TD: Tensor, route_TD: Tensor | None
) -> MoEFFN:
    """A dropped expert's neuron goes where its output energy is largest over the tokens that used it.

    The best assignment under the equal width of experts (`scipy.optimize.linear_sum_assignment`).
    """
    from scipy.optimize import linear_sum_assignment

    # Where tokens go once the others are gone, by a layer that has only the kept experts.
    narrow = replace(spec.stacks[0], expert_width=moe.w_in.shape[1])
    reduced = _dropped(moe, replace(spec, stacks=(narrow,), shrunk="drop"), layer, kept_K, use_E, x_TD, route_TD)
    width, places_EM = spec.expert_width, _places(moe)
    dropped = sorted(set(range(moe.num_experts)) - set(kept_K.tolist()))
    energy_EMK = torch.zeros(len(dropped), moe.neurons.shape[1], len(kept_K), dtype=torch.float64)
    for x, route in _chunks(moe, x_TD, route_TD):
        before_TE = _used(moe, x, route)
        after_TK = _used(reduced, x, route)
        for index, expert in enumerate(dropped):
            both_TK = before_TE[:, expert].unsqueeze(1) * after_TK
            energy_EMK[index] += (_neurons(moe, expert, x).square().T @ both_TK).double()
    energy_EMK *= moe.w_out[dropped].square().sum(1).unsqueeze(-1)

    adopted = places_EM[dropped].flatten()
    real = adopted >= 0
    own_K = (places_EM[kept_K] >= 0).sum(1)
    slot_expert = torch.repeat_interleave(torch.arange(len(kept_K)), width - own_K)
    worth_NS = energy_EMK.flatten(0, 1)[real][:, slot_expert]
    row_N, slot_N = (torch.from_numpy(one) for one in linear_sum_assignment(worth_NS.numpy(), maximize=True))
    places_KM = torch.full((len(kept_K), width), -1)
    for index, expert in enumerate(kept_K.tolist()):
        own = places_EM[expert][places_EM[expert] >= 0]
        new = adopted[real][row_N[slot_expert[slot_N] == index]]
        places_KM[index, : len(own) + len(new)] = torch.cat([own, new])
    made = _gathered(moe, spec, layer, places_KM)
    _take_router(made, moe, kept_K)
    calibrate(made, x_TD, route_TD)
    return made


def _used(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None) -> Tensor:
    """1 where a token uses an expert, [T, E]."""
    return moe.router.choose(moe.scores(x_TD, route_TD), moe.num_active).indicator_TE(moe.num_experts)


def _neurons(moe: MoEFFN, expert: int, x_TD: Tensor) -> Tensor:
    """Activations of an expert's neurons, [T, M]."""

    def of(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked[expert]

    ffn = DenseFFN(
        moe.w_in[expert],
        moe.w_out[expert],
        moe.activation,
        b_in_F=of(moe.b_in),
        w_gate_FD=of(moe.w_gate),
        b_gate_F=of(moe.b_gate),
    )
    return ffn.neurons(x_TD)


def _merged(
    moe: MoEFFN, spec: MoESpec, layer: int, kept_K: Tensor, use_E: Tensor, x_TD: Tensor, route_TD: Tensor | None
) -> MoEFFN:
    """An expert that is not kept joins the kept one whose scores correlate most with its own over the tokens.

    Its neurons are matched with the kept expert's, and the group's weights averaged by use, as in MC-SMoE. The row of
    the router is fitted to the highest score of the group, so that tokens come that would have come to any of it.
    """
    read_TD = x_TD if route_TD is None else route_TD
    scores_TE = torch.cat([moe.router(read) for read in read_TD.split(4096)])
    centred_TE = F.normalize(scores_TE - scores_TE.mean(0), dim=0)
    group_E = (centred_TE.T @ centred_TE[:, kept_K]).argmax(1)
    group_E[kept_K] = torch.arange(len(kept_K))

    made = _gathered(moe, spec, layer, _places(moe)[kept_K])
    _take_router(made, moe, kept_K)
    targets, biases = [], []
    for index, expert in enumerate(kept_K.tolist()):
        members = (group_E == index).nonzero().flatten().tolist()
        if len(members) == 1:
            targets.append(scores_TE[:, expert])
            biases.append(moe.router.balance_bias[expert])
            continue
        total = use_E[members].sum()
        share = (use_E[members] / total if total > 0 else torch.full((len(members),), 1 / len(members))).float()
        order = [matched(moe, expert, member) for member in members]
        for name in ("w_in", "w_gate", "b_in", "b_gate"):
            stacked = getattr(moe, name)
            if stacked is not None:
                mean = sum(part * stacked[m][place] for part, m, place in zip(share, members, order, strict=True))
                getattr(made, name)[index] = mean
        mean = sum(part * moe.w_out[m][:, place] for part, m, place in zip(share, members, order, strict=True))
        made.w_out[index] = mean
        for member, place in zip(members, order, strict=True):  # where the kept expert has padding and another has not
            own_M = made.neurons[index]
            own_M.copy_(torch.where(own_M < 0, moe.neurons[member][place], own_M))
        made.router.weight[index] = share @ moe.router.weight[members]
        made.router.bias[index] = share @ moe.router.bias[members]
        targets.append(scores_TE[:, members].amax(1))
        biases.append(share @ moe.router.balance_bias[members])
    made.router.balance_bias.copy_(torch.stack(biases))
    # The mean of a group's rows begins the fit, so that groups of one stay as they are.
    missing_TK = (torch.stack(targets, dim=1) - made.router(read_TD)) / made.router.scale
    alone_K = torch.bincount(group_E, minlength=len(kept_K)) == 1
    missing_TK[:, alone_K] = 0
    weight_KD, bias_K = ridge(read_TD, missing_TK, GROUP_RIDGE, intercept=made.router.has_bias)
    made.router.weight += weight_KD
    made.router.bias += bias_K
    calibrate(made, x_TD, route_TD)
    return made


def matched(moe: MoEFFN, expert: int, other: int) -> Tensor:
    """Which neuron of the expert `other` is most like each neuron of `expert`, one to one, [M].

    The sum of the inner products of the neurons' rows and columns is the largest there is (Git Re-Basin, arXiv
    2209.04836; MC-SMoE).
    """
    from scipy.optimize import linear_sum_assignment

    def rows(index: int) -> Tensor:  # [M, ...] of all that a neuron is
        parts = [moe.w_in[index], moe.w_out[index].T]
        parts += [one[index] for one in (moe.w_gate,) if one is not None]
        parts += [one[index].unsqueeze(1) for one in (moe.b_in, moe.b_gate) if one is not None]
        return torch.cat(parts, dim=1).detach()

    _, place_M = linear_sum_assignment((rows(expert) @ rows(other).T).numpy(), maximize=True)
    return torch.from_numpy(place_M)


# --- what is fitted and what is told ---------------------------------------------------------------------------------


@torch.no_grad()
def imitate(made: MoEFFN, moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None = None) -> None:
    """Set what follows the neurons in closed form, so that `made` gives on tokens [T, D] what `moe` gives.

    Scale and output bias, as `fit_scale_and_mean` does for the sum of all experts, which after training is no
    aim any more; then the output matrices (ffn2moe.decompose.reconstruct), in layers of one budget, as budgets share
    them, and of at most `WIDEST_MOMENTS` neurons. None of it is worse than what it follows, on these tokens.
    """
    for active in made.budgets:
        made.set_active(active)
        moe.set_active(active)
        wanted, routed = [], []
        for x, route in _chunks(moe, x_TD, route_TD):
            scores_TE = made.scores(x, route)
            routed.append(made.grouped(x, scores_TE, made.router.choose(scores_TE, active)))
            wanted.append(moe(x, route) - made.finish(x, torch.zeros_like(x)))
        y_TD, y_S_TD = torch.cat(wanted), torch.cat(routed)
        moves_bias = made.b_out is not None and active == made.budgets[0]
        y_mean = y_TD.mean(0) if moves_bias else torch.zeros_like(y_TD[0])
        y_S_mean = y_S_TD.mean(0) if moves_bias else torch.zeros_like(y_TD[0])
        own = (y_S_TD - y_S_mean).square().sum(dtype=torch.float64)
        if own > 0:
            cross = ((y_S_TD - y_S_mean) * (y_TD - y_mean)).sum(dtype=torch.float64)
            made.set_scale((cross / own).item())
        if moves_bias:
            made.b_out += y_mean - made.scale * y_S_mean
    made.set_active(made.budgets[0])
    moe.set_active(moe.budgets[0])
    if len(made.budgets) == 1 and made.w_in.shape[:2].numel() <= WIDEST_MOMENTS:
        target_TD = torch.cat([moe(x, route) for x, route in _chunks(moe, x_TD, route_TD)])
        refit_outputs(made, x_TD, target_TD, penalty=PENALTY, route_TD=route_TD)


@torch.no_grad()
def _errors(moe: MoEFFN, made: MoEFFN, x_TD: Tensor, route_TD: Tensor | None) -> tuple[float, float, float]:
    """Before and after against the sum of all experts, and after against before."""
    pieces = []
    for x, route in _chunks(moe, x_TD, route_TD):
        whole, before, after = moe.all_experts(x), moe(x, route), made(x, route)
        differences = (whole, before - whole, after - whole, before, after - before)
        pieces.append(torch.stack([one.double().square().sum() for one in differences]))
    whole, was, now, before, change = torch.stack(pieces).sum(0).sqrt().tolist()
    return was / whole, now / whole, change / before


# --- a folder ---------------------------------------------------------------------------------------------------------


def shrink(
    path: str | Path,
    texts: str | Path,
    out: str | Path,
    *,
    keep: int,
    method: Shrinking,
    text_column: str = "text",
    calibration_tokens: int = 16384,
    device: str = "auto",
    onnx: bool = True,
    say: Callable[[str], None] = lambda line: None,
    track: Callable[[Any, int, str], Iterable[Any]] = lambda items, total, what: items,
) -> dict[str, Any]:
    """Fit the mixture in `path` to the task that `texts` are of, with `keep` experts; write it as an export to `out`.

    `path` is an export or a checkpoint folder; `texts` what `ffn2moe.data.corpus.read_corpus` takes. Gives the
    manifest, whose `shrink` says what became of every layer. There are no dense plans, as the dense model is in neither
    folder. `out` is written whole or not at all. ValueError or FileNotFoundError, with cause and remedy.
    """
    from ffn2moe.onnx import write as export

    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or name another folder")
    folder, reader = _folders(Path(path))
    spec = checkpoint.load_spec(folder)
    require_shrinkable(spec, keep, method)
    device = choose_device(device)
    tokenizer = _tokenizer(reader)
    ids = _token_ids(str(texts), text_column, tokenizer, spec)
    model = checkpoint.load(folder)
    apart = set(range(HELD_OUT - 1, len(ids), HELD_OUT)) or {len(ids) - 1}
    learned = [one for place, one in enumerate(ids) if place not in apart]
    judged = [one for place, one in enumerate(ids) if place in apart]
    task, held_out = (
        see(
            model,
            spec,
            list(in_order(spec.head, part, batch_texts=BATCH_TEXTS, pad_id=tokenizer.pad_token_id or 0)),
            calibration_tokens,
            device,
        )
        for part in (learned, judged)
    )
    say(f"{len(learned)} texts tell which experts are used, {len(judged)} what is lost")
    smaller, reports = shrink_model(model, spec, task, held_out, keep=keep, method=method, track=track)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _written(model, smaller, tokenizer, partial, onnx=onnx, say=say, track=track)
        manifest["shrink"] = {
            "from": spec.to_dict(),
            "keep": keep,
            "method": method,
            "texts": len(ids),
            "layers": [asdict(report) for report in reports],
        }
        export.write_manifest(partial, manifest)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _folders(path: Path) -> tuple[Path, Path]:
    """The checkpoint folder of what the user named, and the folder of its tokenizer."""
    from ffn2moe.containers.table import CONTAINERS
    from ffn2moe.runtime.files import MANIFEST

    if (path / MANIFEST).is_file():
        return path / "checkpoint", path / "tokenizer"
    config = path / "config.json"
    if config.is_file() and not (path / checkpoint.SPEC_FILE).is_file():
        model_type = json.loads(config.read_text()).get("model_type")
        if model_type in CONTAINERS:
            raise ValueError(
                f"{path} is a native {model_type} container, which does not say how it was made: name the export or "
                "the checkpoint folder that it was written with"
            )
    checkpoint.load_spec(path)
    readers = [folder for folder in (path, path.parent / "tokenizer") if any(folder.glob("tokenizer*"))]
    if not readers:
        raise FileNotFoundError(f"{path} has no tokenizer: copy that of the model into it, or name a whole export")
    return path, readers[0]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer that can be read ({str(error).strip().splitlines()[0]}): experts are counted "
            "on texts, so the model must read text"
        ) from None


def _token_ids(texts: str, column: str, tokenizer: Any, spec: MoESpec) -> list[list[int]]:
    """The texts as token ids, cut to the model's length. ValueError for fewer than two."""
    found = read_corpus(texts, column)
    if len(found) < 2:
        raise ValueError(f"{texts} holds one text: one tells which experts are used and one what is lost; give more")
    ids: list[list[int]] = tokenizer(found, truncation=True, max_length=spec.max_length)["input_ids"]
    return ids


def _written(
    model: Any,
    spec: MoESpec,
    tokenizer: Any,
    folder: Path,
    *,
    onnx: bool,
    say: Callable[[str], None],
    track: Callable[[Any, int, str], Iterable[Any]],
) -> dict[str, Any]:
    """An export of the model, without its manifest's file; without graphs where they are not wanted or not possible."""
    from ffn2moe.onnx import write as export

    if onnx:
        try:
            return export.export_model(
                model, None, tokenizer, spec, folder, track=lambda plans, what: track(plans, len(plans), what)
            )
        except ValueError as error:
            say(f"no ONNX graphs: {error}")
            shutil.rmtree(folder)
            folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    checkpoint.save(model, None, spec, folder / "checkpoint")
    return {"spec": spec.to_dict(), "model": export.facts(model, spec), "plans": {}, "refused": {}}
