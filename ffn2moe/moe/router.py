"""The router: score the experts for each token, choose some of them, weigh the chosen."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.choices import SELECTIONS, Selection
from ffn2moe.moe.choice import Choice


class Router(nn.Module):
    """A linear router: ``scores = scale * (x weight' + bias)``.

    A row of SELECTIONS chooses experts by the scores with `balance_bias` [E] added, and a row of GATES weighs them.
    `balance_bias` shifts the choice only; it follows auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2408.15664).
    `scale` sets how far the gates of the chosen are apart and chooses nothing. Both, and the buffers of the selection,
    are saved with the weights and never trained. Without a trained bias, which native containers cannot hold, `bias` is
    a buffer of zeros.
    """

    weight: nn.Parameter
    bias: Tensor
    balance_bias: Tensor
    scale: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        gate: str = "unit",
        bias: bool = True,
        selection: str = "topk",
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
        for name in self.rule.buffers:
            self.register_buffer(name, torch.zeros(()))

    @property
    def rule(self) -> Selection:
        """The row of SELECTIONS that chooses the experts."""
        return SELECTIONS[self.selection]

    @property
    def has_bias(self) -> bool:
        """Whether the bias is trained."""
        return isinstance(self.bias, nn.Parameter)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return scores [T, E], always float32: which experts are chosen must not depend on the compute dtype."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.scale * F.linear(x_TD.float(), self.weight.float(), self.bias.float())

    def ranked(self, scores_TE: Tensor) -> Tensor:
        """Return the values that experts are chosen by, [T, E]."""
        return self.rule.ranked(self, scores_TE)

    def choose(self, scores_TE: Tensor, num_active: int) -> Choice:
        """Return the experts of each token: K of them, or K on average where the selection is not fixed."""
        return Choice(*self.rule.choose(self, self.ranked(scores_TE), num_active))

    def weigh(self, scores_TE: Tensor, choice: Choice, training: bool = False) -> Tensor:
        """Return the weight of each chosen expert, [T, K]; 0 where a pair is not used."""
        return self.rule.weigh(self, scores_TE, choice, training)

    @torch.no_grad()
    def calibrate(self, scores_TE: Tensor, num_active: int) -> None:
        """Make tokens with these scores use K experts on average; do nothing where the selection is fixed."""
        name = self.rule.calibrated
        if name is not None and num_active < scores_TE.shape[1]:
            self.get_buffer(name).copy_(self.rule.calibration(self, scores_TE, num_active))

    @torch.no_grad()
    def follow(self, scores_TE: Tensor, num_active: int, rate: float) -> None:
        """Move a share `rate` of the way to what `calibrate` finds for these scores.

        A step of training changes the scores; this keeps the mean at K while they change.
        """
        name = self.rule.calibrated
        if name is not None:
            moved = self.get_buffer(name)
            before = moved.clone()
            self.calibrate(scores_TE, num_active)
            moved.lerp_(before, 1 - rate)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Set how far the gates of the chosen are apart; the choice stays, if there is no balance bias."""
        self.rule.rescale(self, scale / self.scale)
        self.scale.fill_(scale)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return weight [E, D] and bias [E] of the plain linear map that gives the same scores."""
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

        Leave it alone where the selection calibrates it.
        """
        if self.rule.calibrated != "balance_bias":
            load_E = load_E.float()
            self.balance_bias += step * torch.sign(load_E.mean() - load_E)
