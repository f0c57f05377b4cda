"""Diagnose the layers of a mixture: their distance from dense, the load of the experts, agreement with domains.

Letters as in `ffn2moe.spec`; besides, N texts and C domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ffn2moe import metrics
from ffn2moe.decompose import oracle
from ffn2moe.moe.choice import Choice
from ffn2moe.moe.layer import MoEFFN


@torch.no_grad()
def chosen(moe: MoEFFN, x_TD: Tensor) -> Choice:
    """Return the experts that a layer's tokens [T, D] use."""
    return moe.router.choose(moe.scores(x_TD), moe.num_active)


def of_layer(moe: MoEFFN, x_TD: Tensor) -> dict[str, Any]:
    """Return the figures of `oracle.diagnose` for a layer on tokens [T, D], and the load of its experts.

    `load` is each expert's share of the used pairs, `max_over_mean_load` how far the largest is from an even load,
    `dead_experts` how many no token uses.
    """
    load = metrics.load(chosen(moe, x_TD).pairs()[1], moe.num_experts)
    return {
        **oracle.diagnose(moe, x_TD),
        "max_over_mean_load": load.max_over_mean,
        "dead_experts": load.dead_experts,
        "load": load.share_E,
    }


@dataclass(frozen=True)
class Agreement:
    """Hold how far the experts of one layer agree with the domains of texts, as normalised mutual information.

    It is 0 where the two are independent and 1 where one determines the other. `tokens` compares a used expert with the
    domain of its token, `texts` the expert that a text uses most with the domain of the text.
    """

    tokens: float
    texts: float
    load_CE: list[list[float]]  # share of each expert among the pairs of a domain


def agreement(choice: Choice, text_T: Tensor, domain_of_text: Sequence[str], num_experts: int) -> Agreement:
    """Return the agreement for the choice of T tokens, the text of each token [T], and the domain of each of N texts.

    ValueError where all tokens are from one domain.
    """
    from sklearn.metrics import normalized_mutual_info_score

    domains = sorted({domain_of_text[text] for text in text_T.unique().tolist()})
    if len(domains) < 2:
        raise ValueError(f"all texts are of one domain, {domains[0]!r}: agreement needs at least two")
    number = {domain: place for place, domain in enumerate(domains)}
    domain_N = torch.tensor([number.get(domain, 0) for domain in domain_of_text])
    token_P, expert_P = choice.pairs()
    domain_P = domain_N[text_T[token_P]]
    load_CE = torch.zeros(len(domains), num_experts, dtype=torch.float64)
    load_CE.index_put_((domain_P, expert_P), torch.ones(1, dtype=torch.float64), accumulate=True)
    use_NE = torch.zeros(len(domain_of_text), num_experts).index_add_(0, text_T, choice.indicator_TE(num_experts))
    seen_N = text_T.unique()
    return Agreement(
        tokens=float(normalized_mutual_info_score(domain_P.numpy(), expert_P.numpy())),
        texts=float(normalized_mutual_info_score(domain_N[seen_N].numpy(), use_NE[seen_N].argmax(1).numpy())),
        load_CE=(load_CE / load_CE.sum(1, keepdim=True)).tolist(),
    )
