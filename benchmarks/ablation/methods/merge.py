"""Average each dropped expert into a kept one (MC-SMoE, arXiv 2310.01334; UNCURL, arXiv 2409.01483).

The neurons of a group are matched and averaged by use. The model gets smaller; a token costs what it did. It keeps no
more quality than dropping them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation.method import Method, add
from ffn2moe.decompose.starts.ridge import ridge
from ffn2moe.moe.fit import calibrate
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.shrinking import SHRINK_METHODS, Layer, ShrinkMethod
from ffn2moe.shrinking.neurons import gather, places, take_router

GROUP_RIDGE = 1e-2  # of the fit of a merged expert's score to the highest of its group


def make(layer: Layer) -> MoEFFN:
    """Return the layer in which every dropped expert is merged into the kept one with the most similar scores.

    The router's row of a group is fitted to the highest score of its experts, so that it gets the tokens that any of
    them got.
    """
    moe, kept_K = layer.moe, layer.kept_K
    x_TD = layer.x_TD
    scores_TE = torch.cat([moe.router(x) for x in x_TD.split(4096)])
    centred_TE = F.normalize(scores_TE - scores_TE.mean(0), dim=0)
    group_E = (centred_TE.T @ centred_TE[:, kept_K]).argmax(1)
    group_E[kept_K] = torch.arange(len(kept_K))

    made = gather(moe, layer.spec, layer.index, places(moe)[kept_K])
    take_router(made, moe, kept_K)
    targets, biases = [], []
    for index, expert in enumerate(kept_K.tolist()):
        members = (group_E == index).nonzero().flatten().tolist()
        if len(members) == 1:
            targets.append(scores_TE[:, expert])
            biases.append(moe.router.balance_bias[expert])
            continue
        total = layer.use_E[members].sum()
        share = layer.use_E[members] / total if total > 0 else torch.full((len(members),), 1 / len(members))
        _merge(made, index, moe, expert, members, share.float())
        targets.append(scores_TE[:, members].amax(1))
        biases.append(share.float() @ moe.router.balance_bias[members])
    made.router.balance_bias.copy_(torch.stack(biases))
    # The fit starts from the mean of a group's rows, so that groups of one stay as they are.
    missing_TK = (torch.stack(targets, dim=1) - made.router(x_TD)) / made.router.scale
    alone_K = torch.bincount(group_E, minlength=len(kept_K)) == 1
    missing_TK[:, alone_K] = 0
    weight_KD, bias_K = ridge(x_TD, missing_TK, GROUP_RIDGE, intercept=made.router.has_bias)
    made.router.weight += weight_KD
    made.router.bias += bias_K
    calibrate(made, x_TD)
    return made


def _merge(made: MoEFFN, index: int, moe: MoEFFN, expert: int, members: list[int], share: Tensor) -> None:
    """Replace the expert `index` of `made` by the mean of a group, whose members have these shares of its use."""
    order = [matched(moe, expert, member) for member in members]
    for name in ("w_in", "w_gate", "b_in", "b_gate"):
        stacked = getattr(moe, name)
        if stacked is not None:
            mean = sum(part * stacked[m][place] for part, m, place in zip(share, members, order, strict=True))
            getattr(made, name)[index] = mean
    mean = sum(part * moe.w_out[m][:, place] for part, m, place in zip(share, members, order, strict=True))
    made.w_out[index] = mean
    for member, place in zip(members, order, strict=True):  # where the kept expert has padding and another has not
        own_M = made.neurons[index]
        own_M.copy_(torch.where(own_M < 0, moe.neurons[member][place], own_M))
    made.router.weight[index] = share @ moe.router.weight[members]
    made.router.bias[index] = share @ moe.router.bias[members]


def matched(moe: MoEFFN, expert: int, other: int) -> Tensor:
    """Return the neuron of the expert `other` that is most like each neuron of `expert`, one to one, [M].

    It maximises the sum of the inner products of the neurons' rows and columns (Git Re-Basin, arXiv 2209.04836).
    """
    from scipy.optimize import linear_sum_assignment

    def rows(index: int) -> Tensor:  # [M, ...], all weights of a neuron
        parts = [moe.w_in[index], moe.w_out[index].T]
        parts += [one[index] for one in (moe.w_gate,) if one is not None]
        parts += [one[index].unsqueeze(1) for one in (moe.b_in, moe.b_gate) if one is not None]
        return torch.cat(parts, dim=1).detach()

    _, place_M = linear_sum_assignment((rows(expert) @ rows(other).T).numpy(), maximize=True)
    return torch.from_numpy(place_M)


SHRINK_METHODS.register("merge", ShrinkMethod(make, "MC-SMoE, arXiv 2310.01334", keeps_order=False))
add(Method("merge", "merged", "after conversion", "MC-SMoE, arXiv 2310.01334", after="merge"))
