"""What the layers of a mixture do: how far they are from dense, which experts are used, and by which texts.

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
from ffn2moe.decompose.layer import largest_contributions
from ffn2moe.decompose.partition import super_neurons
from ffn2moe.dense.locate import read_ffn
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.moe.router import Choice


@torch.no_grad()
def chosen(moe: MoEFFN, x_TD: Tensor, route_TD: Tensor | None = None) -> Choice:
    """The experts that a layer's tokens [T, D] use; `route_TD` is for routing `sequence`."""
    return moe.router.choose(moe.scores(x_TD, route_TD), moe.num_active)


def of_layer(
    moe: MoEFFN, x_TD: Tensor, *, text_T: Tensor | None = None, route_TD: Tensor | None = None
) -> dict[str, Any]:
    """What `oracle.diagnose` says of a layer on tokens [T, D], and the load of its experts.

    `load` is each expert's share of the used pairs, `max_over_mean_load` how far the largest is from an even load,
    `dead_experts` how many no token uses.
    """
    load = metrics.load(chosen(moe, x_TD, route_TD).pairs()[1], moe.num_experts)
    return {
        **oracle.diagnose(moe, x_TD, text_T=text_T, route_TD=route_TD),
        "max_over_mean_load": load.max_over_mean,
        "dead_experts": load.dead_experts,
        "load": load.share_E,
    }


@dataclass(frozen=True)
class SuperNeurons:
    """Neurons of one layer that make massive activations (`partition.super_neurons`)."""

    count: int
    shared: int  # of them in the shared expert, which every token uses


def massive(teacher: Any, layers: Sequence[MoEFFN], inputs: Sequence[Tensor]) -> list[SuperNeurons]:
    """The super neurons of every layer of the dense teacher, from the inputs [T, D] of its FFNs."""
    largest = [largest_contributions(read_ffn(teacher, index), x_TD) for index, x_TD in enumerate(inputs)]
    return [
        SuperNeurons(len(found), int(torch.isin(found, moe.shared_neurons).sum()))
        for found, moe in zip(super_neurons(largest), layers, strict=True)
    ]


@dataclass(frozen=True)
class Agreement:
    """How much the experts of one layer say of the domain of a text.

    Both are normalised mutual information, 0 where they are independent and 1 where one tells the other: of a used
    expert and the domain of its token, and of the expert that a text uses most and the domain of the text.
    """

    tokens: float
    texts: float
    load_CE: list[list[float]]  # share of each expert among the pairs of a domain


def agreement(choice: Choice, text_T: Tensor, domain_of_text: Sequence[str], num_experts: int) -> Agreement:
    """Of the choice of T tokens, the text of each [T], and the domain of each of the N texts.

    ValueError where the texts that the tokens are of have one domain only: then there is nothing to agree with.
    """
    from sklearn.metrics import normalized_mutual_info_score

    domains = sorted({domain_of_text[text] for text in text_T.unique().tolist()})
    if len(domains) < 2:
        raise ValueError(f"all texts are of one domain, {domains[0]!r}: agreement needs two at least")
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
