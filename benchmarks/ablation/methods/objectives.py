"""Other losses that a router is trained by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation.method import Method, add
from benchmarks.ablation.methods.starts import about_mean, routed_part
from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import RouterData
from ffn2moe.decompose.objectives import OBJECTIVES, Phase, RouterObjective
from ffn2moe.moe.layer import MoEFFN

TINY = torch.finfo(torch.float32).tiny


def factorllm(data: RouterData) -> list[Phase]:
    """Return the Prior-Approximate loss as published."""
    label_RE = prior_label(data.survey.grams.gram_REE, data.moe.num_active)
    return [Phase(1.0, lambda scores_BE, rows: reverse_kl(scores_BE, label_RE[rows]))]


def mass(data: RouterData) -> list[Phase]:
    """Return the binary cross-entropy to the activation mass of each expert over the largest of all."""
    mass_RE = activation_mass(data.moe, data.x_TD, data.chunk)
    share_RE = mass_RE / mass_RE.max().clamp(min=TINY)
    return [Phase(1.0, lambda scores_BE, rows: F.binary_cross_entropy_with_logits(scores_BE, share_RE[rows]))]


def norm(data: RouterData) -> list[Phase]:
    """Return the mean squared error to the norms of the experts' outputs, over their mean square.

    A router without bias learns the differences alone, which are all that it can give.
    """
    shift = (lambda values_RE: values_RE) if data.moe.router.has_bias else about_mean
    norm_RE, energy = data.survey.norm_TE, data.survey.norm_TE.square().mean().clamp(min=TINY)
    return [Phase(1.0, lambda scores_BE, rows: F.mse_loss(shift(scores_BE), shift(norm_RE[rows])) / energy)]


def prior_label(gram_REE: Tensor, num_active: int) -> Tensor:
    """Return FactorLLM's label, [R, E]: 1 for the K experts nearest to ``y / c``, c = E/K, by themselves.

    ``||E_i - y/c||^2 = G_ii - 2/c sum_j G_ij + ||y/c||^2``, y being the sum of the experts' outputs.
    """
    share = num_active / gram_REE.shape[-1]
    distance_RE = gram_REE.diagonal(dim1=1, dim2=2) - 2 * share * gram_REE.sum(1)
    nearest_RK = distance_RE.topk(num_active, largest=False).indices
    return torch.zeros_like(distance_RE).scatter_(1, nearest_RK, 1.0)


def reverse_kl(scores_RE: Tensor, label_RE: Tensor) -> Tensor:
    """Return ``KL(softmax(scores) || softmax(label))``, mean over rows: FactorLLM's loss."""
    return F.kl_div(label_RE.log_softmax(-1), scores_RE.log_softmax(-1), reduction="batchmean", log_target=True)


def prior_approximate_loss(scores_TE: Tensor, outputs_TED: Tensor, num_active: int) -> Tensor:
    """Return FactorLLM's Prior-Approximate loss as published, mean over tokens, from the experts' outputs [T, E, D].

    docs/methods.md says what is wrong with it; `router_loss` repairs it.
    """
    return reverse_kl(scores_TE, prior_label(oracle.gram(outputs_TED.detach()), num_active))


@torch.no_grad()
def activation_mass(moe: MoEFFN, x_TD: Tensor, chunk: int = 4096) -> Tensor:
    """Return the sum of the activations of each expert's neurons on tokens [T, D], [T, E].

    Positive activations count, as MoEfication's ReLU leaves them. Where the FFN is gated their sign means nothing, and
    absolute values count.
    """
    experts = [routed_part(moe, index) for index in range(moe.num_experts)]
    parts = []
    for x in x_TD.split(chunk):
        h = [ffn.neurons(x) for ffn in experts]
        parts.append(torch.stack([(h_TM.abs() if moe.w_gate is not None else h_TM.relu()).sum(1) for h_TM in h], dim=1))
    return torch.cat(parts)


OBJECTIVES.register("factorllm", RouterObjective("arXiv 2408.11855", factorllm))
OBJECTIVES.register("mass", RouterObjective("MoEfication, arXiv 2110.01786", mass))
OBJECTIVES.register("norm", RouterObjective("D2DMoE, arXiv 2310.04361", norm))

add(
    Method(
        "factorllm-loss",
        "FactorLLM's loss",
        "router objective",
        "arXiv 2408.11855",
        ("router", "distilled"),
        objective="factorllm",
    ),
    Method(
        "mass",
        "activation mass",
        "router objective",
        "MoEfication, arXiv 2110.01786",
        ("router", "distilled"),
        objective="mass",
    ),
    Method(
        "norm",
        "norm of the output",
        "router objective",
        "D2DMoE, arXiv 2310.04361",
        ("router", "distilled"),
        objective="norm",
    ),
    Method(
        "annealed",
        "oracle, temperature 4 to 1",
        "router objective",
        "EvoMoE, arXiv 2112.14397",
        ("router", "distilled"),
        temperature=4.0,
    ),
)
