"""The router: score the experts for each token, choose some of them, weigh the chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.spec import Gate, Selection

BISECTIONS = 60  # of the price of an expert: to the last bit of a float32


@dataclass(frozen=True)
class Choice:
    """The experts that T tokens use: the first K columns, or those of them that `used_TK` marks."""

    experts_TK: Tensor  # int64; highest score first, with `prefix` 0, 1, 2, ...
    used_TK: Tensor | None  # bool; None = all, K of them for every token

    def count_T(self) -> Tensor:
        """How many experts each token uses, int64."""
        T, K = self.experts_TK.shape
        return self.experts_TK.new_full((T,), K) if self.used_TK is None else self.used_TK.sum(1)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Token and expert of every used pair, [P] each, in the order of tokens and then of columns."""
        T, K = self.experts_TK.shape
        token_TK = torch.arange(T, device=self.experts_TK.device).unsqueeze(1).expand(T, K)
        if self.used_TK is None:
            return token_TK.flatten(), self.experts_TK.flatten()
        return token_TK[self.used_TK], self.experts_TK[self.used_TK]

    def indicator_TE(self, num_experts: int) -> Tensor:
        """1 where a token uses an expert and 0 elsewhere, float32 [T, E]."""
        used_TK = torch.ones_like(self.experts_TK) if self.used_TK is None else self.used_TK
        empty_TE = torch.zeros(len(self.experts_TK), num_experts, device=self.experts_TK.device)
        return empty_TE.scatter(1, self.experts_TK, used_TK.to(empty_TE.dtype))

    def load_E(self, num_experts: int) -> Tensor:
        """How many tokens use each expert, int64 [E]."""
        return torch.bincount(self.pairs()[1], minlength=num_experts)


class Router(nn.Module):
    """A linear router: ``scores = scale * (x weight' + bias)``, and the choice that follows from them.

    What is chosen (`Router.choose`), for s the scores with `balance_bias` [E] added:

    - ``topk``: the K experts of highest s.
    - ``threshold``: those with ``s_i >= max s - margin``, at least one, at most `max_active`. With p = softmax(s) that
      is D2DMoE's ``p_i >= (1 - tau) max p`` (arXiv 2310.04361) for ``margin = -log(1 - tau)``. `margin` is the same
      for all tokens and such that they use K on average (`calibrate`).
    - ``prefix``: the first n experts, where s_n says that n are enough and n is the highest; `balance_bias` holds the
      price ``-lambda n`` at which n is K on average (`calibrate`).

    With K = E all three choose every expert. `balance_bias` shifts the choice only; it follows auxiliary-loss-free
    balancing (DeepSeek-V3, arXiv 2408.15664). `scale` sets how far the gates of the chosen are apart and chooses
    nothing. These, and `margin`, are buffers: saved with the weights, never trained. Without a trained bias, which
    native containers cannot hold, `bias` is a buffer of zeros.
    """

    weight: nn.Parameter
    bias: Tensor
    balance_bias: Tensor
    scale: Tensor
    margin: Tensor  # of the selection `threshold` alone

    def __init__(
        self,
        width: int,
        num_experts: int,
        gate: Gate = "unit",
        bias: bool = True,
        selection: Selection = "topk",
        max_active: int | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.selection = selection
        self.max_active = max_active or num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, width))
        if bias:
            self.bias = nn.Parameter(torch.zeros(num_experts))
        else:
            self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("balance_bias", torch.zeros(num_experts))
        self.register_buffer("scale", torch.ones(()))
        if selection == "threshold":
            self.register_buffer("margin", torch.zeros(()))

    @property
    def has_bias(self) -> bool:
        """Whether the bias is trained."""
        return isinstance(self.bias, nn.Parameter)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores [T, E], always float32: which experts are chosen must not depend on the compute dtype."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.scale * F.linear(x_TD.float(), self.weight.float(), self.bias.float())

    def ranked(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by, [T, E]: the scores and the balance bias.

        For `topk` with the sigmoid gate the bias is added to the gates, as DeepSeek-V3 and GLM4-MoE do.
        """
        if self.gate == "sigmoid" and self.selection == "topk":
            scores_TE = scores_TE.sigmoid()
        return scores_TE + self.balance_bias

    def choose(self, scores_TE: Tensor, num_active: int) -> Choice:
        """The experts of each token: K of them, or K on average where the selection is not `topk`."""
        T, E = scores_TE.shape
        ranked_TE = self.ranked(scores_TE)
        if self.selection == "prefix":
            experts_TE = torch.arange(E, device=scores_TE.device).expand(T, E)
            last_T1 = ranked_TE.argmax(1, keepdim=True)
            return Choice(experts_TE, None if num_active == E else experts_TE <= last_T1)
        if self.selection == "topk" or num_active == E:
            return Choice(ranked_TE.topk(num_active, dim=-1).indices, None)
        best_TK, experts_TK = ranked_TE.topk(self.max_active, dim=-1)
        return Choice(experts_TK, best_TK >= best_TK[:, :1] - self.margin)

    def weigh(self, scores_TE: Tensor, choice: Choice, training: bool = False) -> Tensor:
        """The weight of each chosen expert, [T, K]; 0 where a pair is not used.

        `gates` but for `prefix`, whose gates are 1: there training passes the gradient of the probability that the
        prefix reaches expert j, ``sum over n > j of softmax(s)_n``, straight through.
        """
        if self.selection != "prefix":
            return gates(self.gate, scores_TE, choice, training)
        gate_TE = choice.indicator_TE(scores_TE.shape[1])
        if not training:
            return gate_TE
        reached_TE = self.ranked(scores_TE).softmax(-1).flip(1).cumsum(1).flip(1)
        return gate_TE * (1 + reached_TE - reached_TE.detach())

    @torch.no_grad()
    def calibrate(self, scores_TE: Tensor, num_active: int) -> None:
        """Set margin or price so that tokens with these scores use K experts on average; `topk` needs neither."""
        E = scores_TE.shape[1]
        if self.selection == "topk" or num_active == E:
            return
        if self.selection == "prefix":
            self.balance_bias.copy_(-self._price(scores_TE, num_active) * _lengths(self.balance_bias))
        else:
            self.margin.copy_(self._margin(scores_TE, num_active))

    @torch.no_grad()
    def follow(self, scores_TE: Tensor, num_active: int, rate: float) -> None:
        """Move margin or price by a share `rate` of the way to what `calibrate` finds for these scores.

        A step of training changes the scores; this keeps the mean at K while they change.
        """
        if self.selection == "topk":
            return
        moved = self.balance_bias if self.selection == "prefix" else self.margin
        before = moved.clone()
        self.calibrate(scores_TE, num_active)
        moved.lerp_(before, 1 - rate)

    def _margin(self, scores_TE: Tensor, num_active: int) -> Tensor:
        """In closed form: of the T (max_active - 1) gaps to the best score, T (K - 1) are to be within the margin."""
        best_TK = self.ranked(scores_TE).topk(self.max_active, dim=-1).values
        gaps = (best_TK[:, :1] - best_TK[:, 1:]).flatten().sort().values
        wanted = len(scores_TE) * (num_active - 1)
        if wanted == 0:
            return gaps.new_zeros(())
        # Half-way to the next gap, so that rounding decides for no token.
        return gaps[wanted - 1 : wanted + 1].mean()

    def _price(self, scores_TE: Tensor, num_active: int) -> float:
        """By bisection: the mean length of the prefix falls with the price of an expert."""
        length_E = _lengths(scores_TE)
        high = (scores_TE.amax(1) - scores_TE.amin(1)).max().item() + 1.0  # here each token has one expert
        low = -high  # and here all
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            mean = ((scores_TE - price * length_E).argmax(1) + 1.0).mean().item()
            low, high = (price, high) if mean > num_active else (low, price)
        return (low + high) / 2

    def rescale(self, scale: float) -> None:
        """Set how far the gates of the chosen are apart; the choice stays, if there is no balance bias."""
        if self.selection == "threshold":
            self.margin *= scale / self.scale
        self.scale.fill_(scale)

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
        """Move the balance bias one step towards an even load; `load_E` counts the tokens of each expert.

        Not for `prefix`: its first experts are used more by definition, and its bias is the price.
        """
        if self.selection == "prefix":
            return
        load_E = load_E.float()
        self.balance_bias += step * torch.sign(load_E.mean() - load_E)


def _lengths(like: Tensor) -> Tensor:
    """1, 2, ..., E: the lengths of the prefixes."""
    return torch.arange(1, like.shape[-1] + 1, device=like.device, dtype=like.dtype)


def gates(gate: Gate, scores_TE: Tensor, choice: Choice, training: bool = False) -> Tensor:
    """The weight of each chosen expert, [T, K]; 0 where a pair is not used.

    `softmax` and `softmax_topk` are the formulas of Qwen2-MoE and of Mixtral, `sigmoid` that of DeepSeek-V3 and
    GLM4-MoE without renormalisation. Where the formula is constant in the scores (`unit`, and `softmax_topk` for a
    token that uses one expert), training passes the gradient of the softmax over all experts straight through, so
    that the router learns from the loss.
    """
    chosen_TK = scores_TE.gather(-1, choice.experts_TK)
    if gate == "sigmoid":
        gate_TK = chosen_TK.sigmoid()
    elif gate == "softmax":
        gate_TK = scores_TE.softmax(-1).gather(-1, choice.experts_TK)
    else:
        if gate == "unit":
            gate_TK = torch.ones_like(chosen_TK)
        else:
            used_TK = torch.ones_like(chosen_TK, dtype=torch.bool) if choice.used_TK is None else choice.used_TK
            gate_TK = chosen_TK.masked_fill(~used_TK, -torch.inf).softmax(-1)
        if training:
            constant_T1 = (choice.count_T() == 1).unsqueeze(1) | (gate == "unit")
            p_TK = scores_TE.softmax(-1).gather(-1, choice.experts_TK)
            gate_TK = gate_TK + constant_T1 * (p_TK - p_TK.detach())
    return gate_TK if choice.used_TK is None else gate_TK * choice.used_TK


def neutral_scale(gate: Gate, num_experts: int, num_active: int) -> float:
    """What the sum of the chosen experts is multiplied by so that, under equal scores, each counts once."""
    return {"unit": 1.0, "softmax": float(num_experts), "softmax_topk": float(num_active), "sigmoid": 2.0}[gate]
