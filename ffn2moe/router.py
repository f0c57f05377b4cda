"""The router: score the experts for each token and choose K of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Router(nn.Module):
    """A linear router. `weight` [E, D] and `bias` [E] score; `balance_bias` [E] shifts the choice only.

    The balance bias follows auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2408.15664): it is a buffer, so
    that it is saved with the weights and is never trained.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    balance_bias: Tensor

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.register_buffer("balance_bias", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores [T, E], always float32: which experts are chosen must not depend on the compute dtype."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight, self.bias)

    def choose(self, scores_TE: Tensor, num_active: int) -> Tensor:
        """The K experts of each token, [T, K]."""
        return (scores_TE + self.balance_bias).topk(num_active, dim=-1).indices

    @torch.no_grad()
    def set(self, weight_ED: Tensor, bias_E: Tensor) -> None:
        """Take these weights, as a closed-form start gives them."""
        self.weight.copy_(weight_ED)
        self.bias.copy_(bias_E)

    @torch.no_grad()
    def balance(self, load_E: Tensor, step: float) -> None:
        """Move the balance bias one step towards an even load; `load_E` counts the tokens of each expert."""
        load_E = load_E.float()
        self.balance_bias += step * torch.sign(load_E.mean() - load_E)


def ridge(x_TD: Tensor, target_TE: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression from tokens to target scores, in closed form: weight [E, D] and bias [E].

    ``W = (X'X + n penalty s I)^-1 X'U`` on centred data, s the mean variance of X, so that `penalty` has no unit.
    """
    x = x_TD.double()
    u = target_TE.double()
    x_mean, u_mean = x.mean(0), u.mean(0)
    x, u = x - x_mean, u - u_mean
    gram = x.T @ x
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    weight_DE = torch.linalg.solve(gram, x.T @ u)
    bias_E = u_mean - x_mean @ weight_DE
    return weight_DE.T.float().contiguous(), bias_E.float()
