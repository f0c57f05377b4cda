"""Forward KL on the half of the positions with most left to learn (after AdaSPEC, arXiv 2510.19779).

AdaSPEC ranks positions by the student's loss less that of a reference, so that it does not insist on what is hard for
the reference too. Its reference is a second student, distilled before. Here the reference is the teacher: a mixture
starts as its teacher's own weights and not 64 times smaller, so every position is within its reach, and another
reference would cost another distillation. (The student at the start would be the wrong reference: it asks for what has
been learnt least so far, which AdaSPEC avoids.) The gap is taken in expectation over the teacher's next token, which is
KL(teacher || student).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ablation.method import Method, add
from ffn2moe.data.ranks import ALONE, Ranks
from ffn2moe.distill.divergences import DIVERGENCES, Divergence
from ffn2moe.distill.divergences._kl import forward_kl, kl

SHARE = 0.5


def learning_from(share: float) -> Callable[[Tensor, Tensor, float, Ranks], Tensor]:
    """Return a loss on logits [T, V]: the forward KL at this share of the positions."""

    def loss(student_TV: Tensor, teacher_TV: Tensor, progress: float, ranks: Ranks) -> Tensor:
        chosen_T = most_to_learn(student_TV, teacher_TV, share, ranks)
        return forward_kl(student_TV[chosen_T], teacher_TV[chosen_T], ranks)

    return loss


@torch.no_grad()
def most_to_learn(student_TV: Tensor, teacher_TV: Tensor, share: float, ranks: Ranks = ALONE) -> Tensor:
    """Return the positions, in order, of the given share of T with the most left to learn; at least one.

    The share is taken over all processes together. Each gets its own positions, possibly none.
    """
    gap_T = kl(teacher_TV.log_softmax(-1), student_TV.log_softmax(-1))
    place, total = ranks.place(len(gap_T))
    chosen_T = ranks.gather(gap_T).topk(max(1, round(share * total))).indices.sort().values
    return chosen_T[(chosen_T >= place.start) & (chosen_T < place.stop)] - place.start


DIVERGENCES.register(
    "selected_tokens", Divergence(learning_from(SHARE), "AdaSPEC, arXiv 2510.19779", heads=("causal", "seq2seq"))
)
add(
    Method(
        "token_share",
        "the half of the tokens with most to learn",
        "distillation",
        "AdaSPEC, arXiv 2510.19779",
        ("distilled",),
        divergence="selected_tokens",
        heads=("causal",),
    )
)
