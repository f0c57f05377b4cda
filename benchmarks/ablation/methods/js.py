"""Jensen-Shannon divergence of the logits: symmetric and bounded. It lost to forward KL."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from benchmarks.ablation.method import Method, add
from ffn2moe.data.ranks import Ranks
from ffn2moe.distill.divergences import DIVERGENCES, Divergence
from ffn2moe.distill.divergences._kl import kl, share_of_mean


def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
    """Return the mean Jensen-Shannon divergence of logits [T, V]."""
    s_log, t_log = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1)
    middle = torch.logaddexp(s_log, t_log) - log(2)
    return share_of_mean(kl(s_log, middle) + kl(t_log, middle), ranks) / 2


DIVERGENCES.register("js", Divergence(loss, reference="Jensen-Shannon divergence"))
add(
    Method(
        "js", "Jensen-Shannon", "distillation", "docs/methods.md", ("distilled",), divergence="js", heads=("causal",)
    )
)
