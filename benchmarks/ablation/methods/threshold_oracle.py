"""The oracle of the selection `threshold`: as many experts for a token as are worth one price, K on average."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor

from benchmarks.ablation.price import at_one_price
from ffn2moe.decompose import oracle
from ffn2moe.decompose.evidence import Grams, Loss, Survey
from ffn2moe.decompose.oracles import ORACLES, SelectionOracle
from ffn2moe.decompose.regret import independent_regret
from ffn2moe.moe.layer import MoEFFN


class Threshold(SelectionOracle):
    """The best experts of each token, where any number of them may be used."""

    def choose(self, found: Grams, mean: float, most: int | None) -> Tensor:
        """Return the best experts, [R, E]: `mean` on average and at most `most`."""
        return budget_choice(found.gram_REE, mean, most, found.tokens_R)[0]

    def gains(self, found: Grams, num_active: int, most: int | None) -> tuple[Tensor, Tensor]:
        """Return the best experts and by how much more than its price each lowers the error: above 0 if chosen."""
        chosen_RE, price = budget_choice(found.gram_REE, num_active, most, found.tokens_R)
        gain_RE = oracle.toggle_gain(found.gram_REE, chosen_RE) - price * found.tokens_R.unsqueeze(1)
        return chosen_RE, gain_RE

    def regret(self, moe: MoEFFN, survey: Survey) -> Loss:
        """Return the regret of independent draws, whose probabilities add up to K on average over the rows."""
        return independent_regret(moe, survey, together=True)


def best_of_each_size(gram_TEE: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Return for n = 1 to `most` (E) the error of the best n experts, [T, N], and the experts, bool [T, N, E].

    By enumeration or greedily, as `oracle.oracle`.
    """
    E = gram_TEE.shape[-1]
    errors, chosen = [], []
    order_TE = None
    for n in range(1, (most or E) + 1):
        if comb(E, n) <= oracle.MAX_SUBSETS:
            indicator_CE = oracle.subsets(E, n).to(gram_TEE)
            error_T, best_T = oracle.subset_errors(gram_TEE, indicator_CE).min(1)
            chosen_TE = indicator_CE[best_T]
        else:
            order_TE = oracle.drop_order(gram_TEE, 1.0) if order_TE is None else order_TE
            chosen_TE = (order_TE >= E - n).to(gram_TEE)
            left_TE = 1 - chosen_TE
            error_T = ((gram_TEE @ left_TE.unsqueeze(2)).squeeze(2) * left_TE).sum(1).clamp(min=0)
        errors.append(error_T)
        chosen.append(chosen_TE.bool())
    return torch.stack(errors, dim=1), torch.stack(chosen, dim=1)


def budget_choice(
    gram_TEE: Tensor, mean: float, most: int | None = None, weight_T: Tensor | None = None
) -> tuple[Tensor, float]:
    """Return the best experts, indicator [T, E], K = `mean` on average and at most `most` a token; and their price."""
    parts = [best_of_each_size(part, most) for part in gram_TEE.split(oracle.ROWS)]
    count_T, price = at_one_price(torch.cat([errors_TN for errors_TN, _ in parts]), mean, weight_T)
    chosen_TNE = torch.cat([chosen_TNE for _, chosen_TNE in parts])
    return chosen_TNE[torch.arange(len(count_T)), count_T - 1].to(gram_TEE), price


ORACLES.register("threshold", Threshold())
