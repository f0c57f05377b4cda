"""CMoE (arXiv 2502.04416), without training: shared neurons by activation rate, a router of representative neurons.

A neuron is active for a token if it is among the `ACTIVE` strongest. The neurons that are active most often are shared.
The others are clustered by when they are active, in clusters of equal size, and the score of a cluster is the
activation of its representative, the neuron that is nearest to its centre.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ffn2moe.decompose.clustering import balanced_kmeans
from ffn2moe.dense.ffn import DenseFFN

ACTIVE = 10  # neurons of a token
CLUSTERED_TOKENS = 2048
EXPERTS = 8  # of all neurons, shared ones included


class CarvedFFN(nn.Module):
    """The FFN with a part of its neurons for every token, and some of the other clusters for each."""

    def __init__(self, ffn: DenseFFN, shared_S: Tensor, neurons: list[Tensor], nearest_E: Tensor, active: int) -> None:
        super().__init__()
        self.shared, self.active, self.b_out_D = ffn.narrow(shared_S), active, ffn.b_out_D
        self.experts = [ffn.narrow(neurons_M) for neurons_M in neurons]
        self.router = ffn.narrow(nearest_E)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] for [..., D]: every chosen expert counts once."""
        x_TD = x.reshape(-1, x.shape[-1]).float()
        y_TD = self.shared(x_TD)
        chosen_TK = self.router.neurons(x_TD).abs().topk(self.active, dim=1).indices
        for index, expert in enumerate(self.experts):
            tokens_N = (chosen_TK == index).any(1).nonzero().flatten()
            y_TD[tokens_N] += expert(x_TD[tokens_N]).to(y_TD.dtype)
        return (y_TD if self.b_out_D is None else y_TD + self.b_out_D).reshape(x.shape)


@torch.no_grad()
def carved(ffn: DenseFFN, x_TD: Tensor, share: float) -> CarvedFFN:
    """Return the FFN with half of the active share in shared neurons and half in chosen experts, by its inputs [T, D].

    This is SxAxE8 of the paper, with x = 4 times the share.
    """
    active = max(1, round(share * EXPERTS / 2))
    width = -(-ffn.ffn_width // EXPERTS)
    h_TF = ffn.neurons(x_TD[:CLUSTERED_TOKENS])
    marks_TF = torch.zeros_like(h_TF).scatter_(1, h_TF.abs().topk(min(ACTIVE, h_TF.shape[1]), dim=1).indices, 1.0)
    shared_S = marks_TF.sum(0).topk(active * width).indices.sort().values
    routed_F = torch.ones(ffn.ffn_width, dtype=torch.bool)
    routed_F[shared_S] = False
    rest_R = routed_F.nonzero().flatten()
    points_RT = marks_TF[:, rest_R].T
    count = EXPERTS - active
    member_ER = F.one_hot(balanced_kmeans(points_RT, count, seed=0), count).T.bool()
    neurons, nearest = [], []
    for member_R in member_ER:
        own_MT = points_RT[member_R]
        neurons.append(rest_R[member_R])
        nearest.append(neurons[-1][(own_MT - own_MT.mean(0)).square().sum(1).argmin()])
    return CarvedFFN(ffn, shared_S, neurons, torch.stack(nearest), active)
