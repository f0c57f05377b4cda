"""The router: score the experts for each token, choose K of them, weigh the chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.spec import Gate


class Router(nn.Module):
    """A linear router: ``scores = scale * (x weight' + bias)``, of which the K highest are chosen.

    `balance_bias` [E] shifts the choice only; it follows auxiliary-loss-free balancing (DeepSeek-V3,
    arXiv 2408.15664). `scale` sets how far the gates of the chosen are apart and chooses nothing. Both are buffers:
    saved with the weights, never trained. Without a trained bias, which native containers cannot hold, `bias` is a
    buffer of zeros.
    """

    weight: nn.Parameter
    bias: Tensor
    balance_bias: Tensor
    scale: Tensor

    def __init__(self, width: int, num_experts: int, gate: Gate = "unit", bias: bool = True) -> None:
        super().__init__()
        self.gate = gate
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        if bias:
            self.bias = nn.Parameter(torch.zeros(num_experts))
        else:
            self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("scale", torch.ones(()))

    @property
    def has_bias(self) -> bool:
        """Whether the bias is trained."""
        return isinstance(self.bias, nn.Parameter)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores [T, E], always float32: which experts are chosen must not depend on the compute dtype."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.scale * F.linear(x_TD.float(), self.weight.float(), self.bias.float())

    def choose(self, scores_TE: Tensor, num_active: int) -> Tensor:
        """The K experts of each token, [T, K]."""
        ranked_TE = scores_TE.sigmoid() if self.gate == "sigmoid" else scores_TE
        return (ranked_TE + self.balance_bias).topk(num_active, dim=-1).indices

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [E, D] and bias [E] of the plain linear map that gives the same scores."""
        return self.scale * self.weight.detach(), self.scale * self.bias.detach()

    @torch.no_grad()
    def set(self, weight_ED: Tensor, bias_E: Tensor) -> None:
        """Take these weights, as a closed-form start gives them; the scale is 1 again."""
        self.weight.copy_(weight_ED)
        self.bias.copy_(bias_E)
        self.scale.fill_(1.0)

    @torch.no_grad()
    def balance(self, load_E: Tensor, step: float) -> None:
        """Move the balance bias one step towards an even load; `load_E` counts the tokens of each expert."""
        load_E = load_E.float()
        self.balance_bias += step * torch.sign(load_E.mean() - load_E)


def gates(gate: Gate, scores_TE: Tensor, chosen_TK: Tensor, training: bool = False) -> Tensor:
    """The weight of each chosen expert, [T, K].

    `softmax` and `softmax_topk` are the formulas of Qwen2-MoE and of Mixtral, `sigmoid` that of DeepSeek-V3 and
    GLM4-MoE without renormalisation. Where the formula is constant in the scores (`unit`, and `softmax_topk` with
    K = 1), training passes the gradient of the softmax over all experts straight through, so that the router learns
    from the loss.
    """
    if gate == "sigmoid":
        return scores_TE.gather(-1, chosen_TK).sigmoid()
    if gate == "softmax":
        return scores_TE.softmax(-1).gather(-1, chosen_TK)
    constant = gate == "unit" or chosen_TK.shape[-1] == 1
    gate_TK = scores_TE.new_ones(chosen_TK.shape) if constant else scores_TE.gather(-1, chosen_TK).softmax(-1)
    if constant and training:
        p_TK = scores_TE.softmax(-1).gather(-1, chosen_TK)
        gate_TK = gate_TK + (p_TK - p_TK.detach())
    return gate_TK


def neutral_scale(gate: Gate, num_experts: int, num_active: int) -> float:
    """What the sum of the chosen experts is multiplied by so that, under equal scores, each counts once."""
    return {"unit": 1.0, "softmax": float(num_experts), "softmax_topk": float(num_active), "sigmoid": 2.0}[gate]
