"""How a router comes by its weights: where it starts, what it is trained towards, and the training.

A layer by itself on the dense teacher's inputs; no expert changes. A router reads R rows: the T tokens, or with routing
`sequence` their texts, whose labels are sums over their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb, log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.decompose import oracle
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.moe.router import Router
from ffn2moe.numerics import schedule

Start = Literal["ridge", "centroid", "representative", "mean_row", "zeros"]
Objective = Literal["oracle", "factorllm", "mass", "norm"]
Loss = Callable[[Tensor, Tensor], Tensor]  # of the scores [B, E] of the rows [B], mean over the rows

MAX_ENUMERATED = 512  # subsets whose errors are kept for every row; above, the expected error is that of single draws
TINY = torch.finfo(torch.float32).tiny
BISECTIONS = 30  # of the shift that makes independent draws K on average
WARM_SHARE = 1 / 3  # of the steps of `oracle`, on the convex loss


# --- where a router starts --------------------------------------------------------------------------------------------


@torch.no_grad()
def start_weights(
    method: str,
    moe: MoEFFN,
    read_RD: Tensor,
    survey: oracle.Survey,
    x_TD: Tensor,
    *,
    penalty: float,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] that a layer's router starts from; it reads the rows [R, D] of the tokens [T, D].

    - ``ridge``: ridge regression on what `survey` says of the rows: the norms of the experts' outputs, or for `prefix`
      how good each number of experts is.
    - ``centroid``: the mean direction of an expert's input rows (MoEfication, arXiv 2110.01786).
    - ``representative``: the direction of one input row, that of the neuron whose activations on the tokens are nearest
      to those of its expert (CMoE, arXiv 2502.04416). CMoE measures that between 0/1 marks of each token's strongest
      neurons, where a neuron that never fires is near to all; here it is the cosine.
    - ``mean_row``: the mean of an expert's input rows (EMoE, arXiv 2310.10908, after avg-K of arXiv 2305.13999).
    - ``zeros``: all experts alike.

    Input rows of a gated FFN are those of the gate. Rows know nothing of how large a score should be, so that scores
    from them are divided by their standard deviation about each row's mean. ValueError where a start has experts of
    their own as its subject, and the selection is `prefix`, whose scores are of numbers of experts.
    """
    E, D = moe.router.weight.shape
    if method == "zeros":
        return torch.zeros(E, D), torch.zeros(E)
    if method == "ridge":
        target_RE = survey.gain_TE if moe.router.selection == "prefix" else survey.norm_TE
        return ridge(read_RD, target_RE, penalty, intercept=moe.router.has_bias)
    _refuse_prefix(moe, "start", method, "ridge")
    experts = [_routed_part(moe, index) for index in range(E)]
    bias_E = torch.zeros(E)
    if method == "mean_row":
        weight_ED = torch.stack([_input_rows(ffn)[0].mean(0) for ffn in experts])
    elif method == "centroid":
        weight_ED = torch.stack([F.normalize(_input_rows(ffn)[0], dim=1).mean(0) for ffn in experts])
    else:
        nearest = (ffn.narrow(_representative(ffn, x_TD, chunk)) for ffn in experts)
        rows, biases = zip(*map(_input_rows, nearest), strict=True)
        weight_ED = torch.cat(rows)
        if moe.router.has_bias:
            bias_E = torch.cat(biases)
        length_E = weight_ED.norm(dim=1).clamp(min=TINY)
        weight_ED, bias_E = weight_ED / length_E.unsqueeze(1), bias_E / length_E
    scores_RE = F.linear(read_RD, weight_ED, bias_E)
    spread = _about_mean(scores_RE).square().mean().sqrt().clamp(min=TINY)
    return weight_ED / spread, bias_E / spread


def _refuse_prefix(moe: MoEFFN, what: str, asked: str, instead: str) -> None:
    if moe.router.selection == "prefix":
        raise ValueError(
            f"{what} {asked!r} is about single experts, and the router of a nested partition scores how many are "
            f"enough: use {what} {instead!r}"
        )


def _routed_part(moe: MoEFFN, index: int) -> DenseFFN:
    """One expert as a dense FFN, without the zero neurons that fill it up."""

    def part(stacked: Tensor | None) -> Tensor | None:
        return None if stacked is None else stacked[index].detach()

    whole = DenseFFN(
        w_in_FD=moe.w_in[index].detach(),
        w_out_DF=moe.w_out[index].detach(),
        activation=moe.activation,
        b_in_F=part(moe.b_in),
        w_gate_FD=part(moe.w_gate),
        b_gate_F=part(moe.b_gate),
    )
    return whole.narrow((moe.neurons[index] >= 0).nonzero().flatten())


def _input_rows(ffn: DenseFFN) -> tuple[Tensor, Tensor]:
    """The rows [F, D] and biases [F] by which neurons are switched on: those of the gate, where there is one."""
    rows_FD, b_F = (ffn.w_in_FD, ffn.b_in_F) if ffn.w_gate_FD is None else (ffn.w_gate_FD, ffn.b_gate_F)
    return rows_FD, torch.zeros(len(rows_FD)) if b_F is None else b_F


def _representative(expert: DenseFFN, x_TD: Tensor, chunk: int) -> Tensor:
    """The neuron whose activations on tokens [T, D] have the largest cosine with the sum of all, each of norm 1. [1]"""
    moments_MM = torch.zeros(expert.ffn_width, expert.ffn_width, dtype=torch.float64)
    for x in x_TD.split(chunk):
        h_TM = expert.neurons(x)
        moments_MM += (h_TM.T @ h_TM).double()
    norm_M = moments_MM.diagonal().sqrt()
    cosine_MM = moments_MM / (norm_M * norm_M.unsqueeze(1)).clamp(min=TINY)
    return cosine_MM.sum(1).argmax().unsqueeze(0)


def ridge(x_TD: Tensor, target_TE: Tensor, penalty: float, intercept: bool = True) -> tuple[Tensor, Tensor]:
    """Ridge regression from tokens to target scores, in closed form: weight [E, D] and bias [E].

    ``W = (X'X + n penalty s I)^-1 X'U`` on centred data, s the mean variance of X, so that `penalty` has no unit.
    Without an intercept the bias is 0, and each token's targets are taken about their mean, which no choice sees.
    """
    x = x_TD.double()
    u = target_TE.double()
    if not intercept:
        gram = x.T @ x
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        weight_DE = torch.linalg.solve(gram, x.T @ (u - u.mean(1, keepdim=True)))
        return weight_DE.T.float().contiguous(), torch.zeros(u.shape[1])
    x_mean, u_mean = x.mean(0), u.mean(0)
    x, u = x - x_mean, u - u_mean
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight_DE = torch.linalg.solve(gram, x.T @ u)
    bias_E = u_mean - x_mean @ weight_DE
    return weight_DE.T.float().contiguous(), bias_E.float()


# --- what a router is trained towards ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """A part of the training: its share of the steps, and what they minimise."""

    share: float
    loss: Loss


@torch.no_grad()
def phases(
    objective: str,
    moe: MoEFFN,
    x_TD: Tensor,
    survey: oracle.Survey,
    *,
    text_T: Tensor | None = None,
    chunk: int = 4096,
) -> list[Phase]:
    """What the steps of training minimise, one phase after the other, on the rows of `survey`.

    - ``oracle``: the repaired Prior-Approximate loss (`router_loss`), which is convex, then from there the expected
      error itself (`expected_regret`).
    - ``factorllm``: the Prior-Approximate loss as published (arXiv 2408.11855): `prior_label`, `reverse_kl`.
    - ``mass``: binary cross-entropy to the activation mass of each expert over the largest of all
      (MoEfication, arXiv 2110.01786): `activation_mass`.
    - ``norm``: mean squared error to the norms of the experts' outputs (D2DMoE, arXiv 2310.04361), over their
      mean square. A router without bias is asked for the differences alone, which are all that it can give.

    ValueError for labels of single experts where the selection is `prefix`.
    """
    if objective == "oracle":
        target_RE = softmax_target(survey.gain_TE, moe.num_active)
        warm = Phase(WARM_SHARE, lambda scores_BE, rows: router_loss(scores_BE, target_RE[rows]))
        return [warm, Phase(1 - WARM_SHARE, expected_regret(moe, survey))]
    _refuse_prefix(moe, "objective", objective, "oracle")
    if objective == "factorllm":
        label_RE = prior_label(survey.grams.gram_REE, moe.num_active)
        return [Phase(1.0, lambda scores_BE, rows: reverse_kl(scores_BE, label_RE[rows]))]
    if objective == "mass":
        mass_RE = activation_mass(moe, x_TD, text_T, chunk)
        share_RE = mass_RE / mass_RE.max().clamp(min=TINY)
        return [Phase(1.0, lambda scores_BE, rows: F.binary_cross_entropy_with_logits(scores_BE, share_RE[rows]))]
    shift = (lambda values_RE: values_RE) if moe.router.has_bias else _about_mean
    norm_RE, energy = survey.norm_TE, survey.norm_TE.square().mean().clamp(min=TINY)
    return [Phase(1.0, lambda scores_BE, rows: F.mse_loss(shift(scores_BE), shift(norm_RE[rows])) / energy)]


def _about_mean(values_RE: Tensor) -> Tensor:
    return values_RE - values_RE.mean(1, keepdim=True)


def softmax_target(gain_TE: Tensor, num_active: int, iterations: int = 40) -> Tensor:
    """The router's target ``q = softmax(gain / tau)``, [T, E], with tau such that the mean entropy is log K.

    K equally good experts have entropy log K, so that is as sharp as a target for a choice of K can be. For
    K = 1 the target is the one-hot best expert.
    """
    if num_active == 1:
        return F.one_hot(gain_TE.argmax(-1), gain_TE.shape[-1]).to(gain_TE)
    wanted = log(min(num_active, gain_TE.shape[-1]))
    spread = gain_TE.std().clamp(min=1e-30)  # 2^-20 of which is a normal number: others may be taken as 0
    low, high = -20.0, 20.0  # log2 of tau in units of the spread; the entropy rises with tau
    for _ in range(iterations):
        middle = (low + high) / 2
        q_TE = (gain_TE / (spread * 2**middle)).softmax(-1)
        entropy = -(q_TE * q_TE.clamp(min=1e-30).log()).sum(-1).mean()
        low, high = (middle, high) if entropy < wanted else (low, middle)
    return (gain_TE / (spread * 2**high)).softmax(-1)


def router_loss(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Repaired Prior-Approximate loss: forward ``KL(target || softmax(scores))``, mean over tokens.

    FactorLLM's loss (arXiv 2408.11855) is the reverse KL to a K-hot label; see docs/methods.md for what
    was repaired and why.
    """
    return F.kl_div(scores_TE.log_softmax(-1), target_TE, reduction="batchmean")


def expected_regret(moe: MoEFFN, survey: oracle.Survey) -> Loss:
    """The error to expect when experts are drawn with probabilities from the scores: what the router is judged by.

    In units in which the best choice has 0 and a blind one 1. Under `topk` a subset S has the probability
    ``softmax over all subsets of K of sum of s_i, i in S``, for `prefix` the first n experts have softmax(s)_n, and the
    expectation is exact. For `threshold`, and above `MAX_ENUMERATED` subsets, experts are drawn independently with
    ``p_i = sigmoid(s_i + t)``, whose expected error ``||y - a y_S||^2`` is
    ``1'G1 - 2a 1'Gp + a^2 (p'Gp + sum_i G_ii p_i (1 - p_i))``. The scale a is the best for the best choice.
    """
    gram_REE, selection, K = survey.grams.gram_REE, moe.router.selection, moe.num_active
    E = moe.num_experts
    scale = oracle.fit_scale(survey.grams, survey.chosen_TE).scale
    if selection == "prefix":
        return _enumerated(-survey.gain_TE, torch.eye(E))
    if selection == "topk" and comb(E, K) <= MAX_ENUMERATED:
        indicator_CE = oracle.subsets(E, K).to(gram_REE)
        parts = [oracle.subset_errors(part, indicator_CE, scale) for part in gram_REE.split(oracle.ROWS)]
        return _enumerated(torch.cat(parts), indicator_CE)
    blind = independent_error(gram_REE, torch.full_like(survey.chosen_TE, K / E), scale).mean()
    least = independent_error(gram_REE, survey.chosen_TE, scale).mean()
    unit = (blind - least).clamp(min=1e-6 * gram_REE.sum((1, 2)).mean().item() + TINY)  # with K = E both are alike

    def loss(scores_BE: Tensor, rows: Tensor) -> Tensor:
        p_BE = draw_probabilities(scores_BE, K, together=selection == "threshold")
        return (independent_error(gram_REE[rows], p_BE, scale).mean() - least) / unit

    return loss


def _enumerated(error_RC: Tensor, indicator_CE: Tensor) -> Loss:
    """The expected regret where each of C choices has a known error and, as its logit, the sum of its scores."""
    regret_RC = error_RC - error_RC.amin(1, keepdim=True)
    regret_RC = regret_RC / regret_RC.mean().clamp(min=TINY)

    def loss(scores_BE: Tensor, rows: Tensor) -> Tensor:
        p_BC = (scores_BE @ indicator_CE.T).softmax(-1)
        return (p_BC * regret_RC[rows]).sum(-1).mean()

    return loss


def independent_error(gram_REE: Tensor, p_RE: Tensor, scale: float) -> Tensor:
    """Expected ``||y - scale y_S||^2`` when each expert is in S with a probability of its own, [R]."""
    mixed_RE = (gram_REE @ p_RE.unsqueeze(2)).squeeze(2) + gram_REE.diagonal(dim1=1, dim2=2) * (1 - p_RE)
    return gram_REE.sum((1, 2)) - 2 * scale * (gram_REE.sum(1) * p_RE).sum(1) + scale**2 * (mixed_RE * p_RE).sum(1)


def draw_probabilities(scores_RE: Tensor, num_active: int, *, together: bool = False) -> Tensor:
    """``sigmoid(s_i + t)``, [R, E], with t such that the probabilities of a row add up to K.

    `together`: one t for scores about the highest of each row, and K is the mean over rows. The gradient is that of the
    sum held at K, by the implicit function theorem.
    """
    rows, wanted = scores_RE, num_active
    if together:
        rows = (scores_RE - scores_RE.amax(1, keepdim=True)).flatten().unsqueeze(0)
        wanted = num_active * len(scores_RE)
    with torch.no_grad():
        low, high = -rows.amax(1, keepdim=True) - 30, 30 - rows.amin(1, keepdim=True)
        for _ in range(BISECTIONS):
            shift = (low + high) / 2
            many = (rows + shift).sigmoid().sum(1, keepdim=True) > wanted
            low, high = torch.where(many, low, shift), torch.where(many, shift, high)
        p = (rows + shift).sigmoid()
        slope = (p * (1 - p)).sum(1, keepdim=True).clamp(min=TINY)
    moved = (rows + shift).sigmoid().sum(1, keepdim=True)
    shift = shift - (moved - moved.detach()) / slope
    return (rows + shift).sigmoid().view_as(scores_RE)


def prior_label(gram_REE: Tensor, num_active: int) -> Tensor:
    """FactorLLM's label (arXiv 2408.11855), [R, E]: 1 for the K experts nearest to ``y / c``, c = E/K, by themselves.

    ``||E_i - y/c||^2 = G_ii - 2/c sum_j G_ij + ||y/c||^2``, y being the sum of the experts' outputs.
    """
    share = num_active / gram_REE.shape[-1]
    distance_RE = gram_REE.diagonal(dim1=1, dim2=2) - 2 * share * gram_REE.sum(1)
    nearest_RK = distance_RE.topk(num_active, largest=False).indices
    return torch.zeros_like(distance_RE).scatter_(1, nearest_RK, 1.0)


def reverse_kl(scores_RE: Tensor, label_RE: Tensor) -> Tensor:
    """``KL(softmax(scores) || softmax(label))``, mean over rows: FactorLLM's loss."""
    return F.kl_div(label_RE.log_softmax(-1), scores_RE.log_softmax(-1), reduction="batchmean", log_target=True)


def prior_approximate_loss(scores_TE: Tensor, outputs_TED: Tensor, num_active: int) -> Tensor:
    """FactorLLM's Prior-Approximate loss as published (arXiv 2408.11855), mean over tokens: the rival of `router_loss`.

    From the experts' outputs [T, E, D]. docs/methods.md says what is wrong with it.
    """
    return reverse_kl(scores_TE, prior_label(oracle.gram(outputs_TED.detach()), num_active))


@torch.no_grad()
def activation_mass(moe: MoEFFN, x_TD: Tensor, text_T: Tensor | None = None, chunk: int = 4096) -> Tensor:
    """The sum of the activations of each expert's neurons, [R, E], on tokens [T, D] or over their texts [T].

    Positive activations, as those of MoEfication's ReLU are; where the FFN is gated their sign means nothing, and the
    absolute values are taken.
    """
    experts = [_routed_part(moe, index) for index in range(moe.num_experts)]
    parts = []
    for x in x_TD.split(chunk):
        h = [ffn.neurons(x) for ffn in experts]
        parts.append(torch.stack([(h_TM.abs() if moe.w_gate is not None else h_TM.relu()).sum(1) for h_TM in h], dim=1))
    mass_TE = torch.cat(parts)
    if text_T is None:
        return mass_TE
    return mass_TE.new_zeros(int(text_T.max()) + 1, moe.num_experts).index_add_(0, text_T, mass_TE)


# --- the training -----------------------------------------------------------------------------------------------------


def train_router(
    router: Router,
    read_RD: Tensor,
    parts: Sequence[Phase],
    *,
    steps: int,
    batch_rows: int,
    learning_rate: float,
    seed: int,
    temperature: float = 1.0,
) -> Iterator[float]:
    """Minimise the loss of each phase in turn on the rows [R, D] that a layer's router reads; yields each step's loss.

    AdamW; each phase has a schedule of its own. The scores are divided by a temperature that falls geometrically from
    `temperature` at the first step to 1 at the last, so that every expert is heard before the choice hardens
    (EvoMoE's dense-to-sparse gate, arXiv 2112.14397). Inputs are whitened per feature inside, so that the learning
    rate means the same in every layer; the weights are those of the plain inputs again at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation_D = read_RD.std(0).clamp(min=1e-6)
    mean_D = read_RD.mean(0) if router.has_bias else torch.zeros_like(deviation_D)
    white_RD = (read_RD - mean_D) / deviation_D
    weight = (router.weight.detach() * deviation_D).requires_grad_(True)
    bias = (router.bias.detach() + router.weight.detach() @ mean_D).requires_grad_(router.has_bias)
    trained = [weight, bias] if router.has_bias else [weight]
    # One buffer for all batches: memory that is asked for anew in every step costs more than the copy.
    batch_BD = white_RD.new_empty(min(batch_rows, len(white_RD)), white_RD.shape[1])
    begin = 0
    behind = 0.0
    for phase in parts:
        behind += phase.share
        end = steps if phase is parts[-1] else round(behind * steps)
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        for step in range(begin, end):
            rows = torch.randint(len(white_RD), (len(batch_BD),), generator=generator)
            torch.index_select(white_RD, 0, rows, out=batch_BD)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(step - begin, end - begin)
            scores_BE = F.linear(batch_BD, weight, bias) / temperature ** (1 - step / max(1, steps - 1))
            loss = phase.loss(scores_BE, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()
        begin = end
    with torch.no_grad():
        router.weight.copy_(weight / deviation_D)
        router.bias.copy_(bias - router.weight @ mean_D)
