"""The oracle of the selection `prefix`: the first n experts, n by what they are worth to each token, K on average."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ablation.price import at_one_price
from ffn2moe.decompose.evidence import Grams, Loss, Survey
from ffn2moe.decompose.oracles import ORACLES, SelectionOracle
from ffn2moe.decompose.regret import enumerated_regret
from ffn2moe.moe.layer import MoEFFN


class Prefix(SelectionOracle):
    """The best number of experts for each token."""

    rates_numbers = True

    def choose(self, found: Grams, mean: float, most: int | None) -> Tensor:
        """Return the first n experts of each row, [R, E]: `mean` on average."""
        gram_REE = found.gram_REE
        count_R1 = prefix_choice(gram_REE, mean, found.tokens_R).unsqueeze(1)
        return (torch.arange(gram_REE.shape[-1], device=gram_REE.device) < count_R1).to(gram_REE)

    def gains(self, found: Grams, num_active: int, most: int | None) -> tuple[Tensor, Tensor]:
        """Return the best prefix, and minus the error and price of the first n: highest at the best n. [R, E] each."""
        gram_REE = found.gram_REE
        errors_RE = prefix_errors(gram_REE)
        count_R, price = at_one_price(errors_RE, num_active, found.tokens_R)
        number_E = torch.arange(1, gram_REE.shape[-1] + 1, device=gram_REE.device)
        chosen_RE = (number_E <= count_R.unsqueeze(1)).to(gram_REE)
        return chosen_RE, -(errors_RE + price * number_E * found.tokens_R.unsqueeze(1))

    def regret(self, moe: MoEFFN, survey: Survey) -> Loss:
        """Return the exact regret where the first n experts have the probability ``softmax(s)_n``."""
        return enumerated_regret(-survey.gain_TE, torch.eye(moe.num_experts))


def prefix_errors(gram_TEE: Tensor) -> Tensor:
    """Return the squared error of the first n experts for n = 1 to E, [T, E]: inner products of the others, summed."""
    among_TEE = gram_TEE.flip(1, 2).cumsum(1).cumsum(2)  # [i, j]: of the last i + 1 with the last j + 1
    last_TE = among_TEE.diagonal(dim1=1, dim2=2)
    return torch.cat([last_TE[:, :-1].flip(1), torch.zeros_like(last_TE[:, :1])], dim=1).clamp(min=0)


def prefix_choice(gram_TEE: Tensor, mean: float, weight_T: Tensor | None = None) -> Tensor:
    """Return how many of the first experts each token should use, [T] int64, K = `mean` on average."""
    return at_one_price(prefix_errors(gram_TEE), mean, weight_T)[0]


ORACLES.register("prefix", Prefix())
