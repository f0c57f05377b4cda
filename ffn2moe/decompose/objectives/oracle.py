"""Learn the oracle's choice: first a convex loss, then the expected error itself."""

from __future__ import annotations

from math import log

from torch import Tensor
from torch.nn import functional as F

from ffn2moe.decompose.evidence import RouterData
from ffn2moe.decompose.objectives import Phase, RouterObjective
from ffn2moe.decompose.oracles import ORACLES

WARM_SHARE = 1 / 3  # share of the steps on the convex loss


def phases(data: RouterData) -> list[Phase]:
    """Return two phases: the repaired Prior-Approximate loss, which is convex, then the expected regret."""
    moe, survey = data.moe, data.survey
    target_RE = softmax_target(survey.gain_TE, moe.num_active)
    warm = Phase(WARM_SHARE, lambda scores_BE, rows: router_loss(scores_BE, target_RE[rows]))
    return [warm, Phase(1 - WARM_SHARE, ORACLES[moe.router.selection].regret(moe, survey))]


def softmax_target(gain_TE: Tensor, num_active: int, iterations: int = 40) -> Tensor:
    """Return the router's target ``q = softmax(gain / tau)``, [T, E], with tau such that the mean entropy is log K.

    K equally good experts have entropy log K, so no target for a choice of K can be sharper. For K = 1 the target is
    the one-hot best expert.
    """
    if num_active == 1:
        return F.one_hot(gain_TE.argmax(-1), gain_TE.shape[-1]).to(gain_TE)
    wanted = log(min(num_active, gain_TE.shape[-1]))
    spread = gain_TE.std().clamp(min=1e-30)  # times 2^-20 it is still a normal number; others may be taken as 0
    low, high = -20.0, 20.0  # log2 of tau in units of the spread; the entropy rises with tau
    for _ in range(iterations):
        middle = (low + high) / 2
        q_TE = (gain_TE / (spread * 2**middle)).softmax(-1)
        entropy = -(q_TE * q_TE.clamp(min=1e-30).log()).sum(-1).mean()
        low, high = (middle, high) if entropy < wanted else (low, middle)
    return (gain_TE / (spread * 2**high)).softmax(-1)


def router_loss(scores_TE: Tensor, target_TE: Tensor) -> Tensor:
    """Return the repaired Prior-Approximate loss: forward ``KL(target || softmax(scores))``, mean over tokens.

    FactorLLM's loss (arXiv 2408.11855) is the reverse KL to a K-hot label; docs/methods.md says what was repaired, and
    why.
    """
    return F.kl_div(scores_TE.log_softmax(-1), target_TE, reduction="batchmean")


ROW = RouterObjective("docs/methods.md", phases, single_experts=False)
