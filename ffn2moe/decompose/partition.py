"""Neurons -> experts: which neurons of a dense FFN belong together.

Every partition is balanced: the widths of two experts differ by one neuron at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.decompose.statistics import NeuronStatistics
from ffn2moe.dense.ffn import DenseFFN
from ffn2moe.numerics import WIDEST_MOMENTS

PartitionMethod = Literal["coactivation", "weights", "gradient", "nested", "random", "contiguous"]
PROFILE_DIRECTIONS = 64  # principal directions of a neuron's profile that the clustering sees
MOST_DIMENSIONS = 256  # of the points that the clustering of a wide FFN sees
STARTS = 8  # of the clustering of other FFNs
SETTLED = 1e-4  # of the mean variance: clustering ends when the centres move by less
SWEEPS = 2  # over the experts, to find their prices
SUPER_QUANTILE, SUPER_SHARE = 0.999, 0.1  # of the largest contributions of all neurons, and of the largest of these


def contiguous(ffn_width: int, num_experts: int) -> Tensor:
    """Equal runs of neurons in their order (FactorLLM, arXiv 2408.11855): a control. [F]"""
    return torch.arange(ffn_width) * num_experts // ffn_width


def random(ffn_width: int, num_experts: int, seed: int) -> Tensor:
    """Neurons dealt at random (LLaMA-MoE, arXiv 2406.16554): a control. [F]"""
    order = torch.randperm(ffn_width, generator=torch.Generator().manual_seed(seed))
    expert_of_neuron_F = torch.empty(ffn_width, dtype=torch.int64)
    expert_of_neuron_F[order] = contiguous(ffn_width, num_experts)
    return expert_of_neuron_F


def weights(ffn: DenseFFN, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means on the direction of each neuron's input row (MoEfication, arXiv 2110.01786). [F]

    For a gated FFN the directions of the gate row and of the up row stand side by side.
    """
    rows = [F.normalize(w, dim=1) for w in (ffn.w_gate_FD, ffn.w_in_FD) if w is not None]
    return balanced_kmeans(torch.cat(rows, dim=1), num_experts, seed)


def coactivation(statistics: NeuronStatistics, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means on activation profiles: neurons that fire together go together. [F]

    A neuron's profile is its centred, normalised activation over the calibration tokens. Distances between
    profiles are known from their correlation matrix, whose leading eigenvectors give the coordinates.
    """
    return balanced_kmeans(statistics.profiles(PROFILE_DIRECTIONS, seed), num_experts, seed)


def gradient(importance_EF: Tensor) -> Tensor:
    """Neurons to the experts that need them, by their importance to E groups of tokens. [F]

    LLaMA-MoE (arXiv 2406.16554; its experts without neurons in common): of all pairs of expert and neuron the most
    important comes first; it is made if the neuron is free and the expert not full. The groups are clusters of tokens
    at the layer's input, as in LLaMA-MoE v2 (arXiv 2411.15708): see `token_groups`.
    """
    E, width = importance_EF.shape
    least, wider = divmod(width, E)  # `wider` of the experts hold one neuron more
    expert_of_neuron = [-1] * width
    held = [0] * E
    for pair in importance_EF.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(pair, width)
        if expert_of_neuron[neuron] >= 0 or held[expert] > least or (held[expert] == least and not wider):
            continue
        wider -= held[expert] == least
        expert_of_neuron[neuron] = expert
        held[expert] += 1
    return torch.tensor(expert_of_neuron)


def token_groups(x_TD: Tensor, num_groups: int, seed: int) -> Tensor:
    """Tokens [T, D] in groups of about equal size: balanced k-means on their leading directions. [T] int64

    ValueError if there are fewer tokens than groups.
    """
    if len(x_TD) < num_groups:
        raise ValueError(
            f"{len(x_TD)} calibration tokens do not make {num_groups} groups, which the gradient partition needs: "
            "give it more text"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        directions = min(PROFILE_DIRECTIONS, *x_TD.shape)
        points_TP = torch.pca_lowrank(x_TD, directions)[0]
    return balanced_kmeans(points_TP, num_groups, seed)


def nested(energy_F: Tensor, num_experts: int) -> Tensor:
    """Neurons in blocks by their output energy, expert 0 that of the highest, so that any first n are a good FFN. [F]

    Nested sub-networks as in SortedNet (arXiv 2309.00255), of which Adaptive Computation Modules (arXiv 2312.10193)
    choose how many a token runs.
    """
    expert_of_neuron_F = torch.empty(len(energy_F), dtype=torch.int64)
    expert_of_neuron_F[energy_F.argsort(descending=True, stable=True)] = contiguous(len(energy_F), num_experts)
    return expert_of_neuron_F


def balanced_kmeans(points_FP: Tensor, num_experts: int, seed: int) -> Tensor:
    """K-means whose clusters differ in size by one at most; clusters are named by their first neuron. [F]

    Lloyd's algorithm with the assignment that is best under these sizes (Bradley, Bennett & Demiriz 2000:
    `balanced_assignment`) from k-means++ starts, the best of several where a run is short.
    """
    from sklearn.cluster import kmeans_plusplus

    count = len(points_FP)
    wide = count > WIDEST_MOMENTS  # then a run takes seconds, and what its last steps gain is slight
    if wide and points_FP.shape[1] > MOST_DIMENSIONS:
        # A random projection keeps the distances, and so the cost of every clustering (Johnson & Lindenstrauss 1984).
        generator = torch.Generator().manual_seed(seed)
        points_FP = points_FP @ torch.randn(points_FP.shape[1], MOST_DIMENSIONS, generator=generator).to(points_FP)
    points_FP = points_FP.double()
    points_FP = points_FP - points_FP.mean(0)
    random_state = np.random.RandomState(seed)
    least, labels = np.inf, np.zeros(count, dtype=np.int64)
    for _ in range(1 if wide else STARTS):
        start_EP, _ = kmeans_plusplus(points_FP.numpy(), num_experts, random_state=random_state)
        found, inertia = _lloyd(points_FP, torch.from_numpy(start_EP), 50 if wide else 300)
        if inertia < least:
            least, labels = inertia, found
    _, first = np.unique(labels, return_index=True)
    rank = np.empty(num_experts, dtype=np.int64)
    rank[labels[np.sort(first)]] = np.arange(num_experts)
    return torch.from_numpy(rank[labels])


def _lloyd(points_FP: Tensor, centre_EP: Tensor, most_steps: int) -> tuple[np.ndarray, float]:
    """Balanced clusters of centred points from these centres on, [F] int64, and the sum of squares within them."""
    enough = SETTLED * points_FP.var(0, correction=0).mean().item()
    energy = points_FP.square().sum().item()
    price_E = np.zeros(len(centre_EP))
    for _ in range(most_steps):
        # Squared distances to the centres, less the squared norm of the point, which chooses nothing.
        cost_EF = centre_EP.square().sum(1, keepdim=True) - 2 * centre_EP @ points_FP.T
        labels, price_E = balanced_assignment(cost_EF.numpy(), price_E)
        member_EF = F.one_hot(torch.from_numpy(labels), len(centre_EP)).T.double()
        size_E1 = member_EF.sum(1, keepdim=True)
        before_EP, centre_EP = centre_EP, member_EF @ points_FP / size_E1
        if (centre_EP - before_EP).square().sum().item() <= enough:
            break
    return labels, energy - (size_E1 * centre_EP.square()).sum().item()


def balanced_assignment(cost_EF: np.ndarray, price_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest assignment of F neurons to E experts whose sizes differ by one at most, [F] int64, and its prices.

    A minimum-cost flow, solved exactly. `price_E` is a guess of what a place in each expert is worth, such as the
    prices of a similar problem; it changes how long this takes and, but for ties, nothing else. Each neuron first goes
    where cost and price are least, after the prices are set so that sizes come out almost right. That is optimal for
    the sizes that it gives. Then neurons move along the cheapest path from an expert with too many to one with too few
    (successive shortest paths, Ahuja, Magnanti & Orlin 1993, chapter 9.7), which keeps it so. An edge of the path is
    the neuron that is cheapest to move, so the graph has one node an expert, and one more for the F mod E places that
    any expert may have beyond the others.
    """
    E, count = cost_EF.shape
    if E == 1:
        return np.zeros(count, dtype=np.int64), price_E
    base, spare = divmod(count, E)
    labels_F, price_E = _priced(cost_EF, price_E, base)
    size_E = np.bincount(labels_F, minlength=E)
    extra_E = np.zeros(E, dtype=np.int64)  # 1 where an expert has one of the spare places
    step = np.full((E + 1, E + 1), np.inf)  # cost of one neuron more here and one less there; the last is spare places
    step[:E, E] = 0
    mover_EE = np.zeros((E, E), dtype=np.int64)
    tolerance = 1e-12 * np.abs(cost_EF).max(initial=0)

    def look(expert: int) -> None:
        members = np.flatnonzero(labels_F == expert)
        if len(members) == 0:
            step[expert, :E] = np.inf
            return
        rise_EN = cost_EF[:, members] - cost_EF[expert, members]
        cheapest_E = rise_EN.argmin(1)
        mover_EE[expert] = members[cheapest_E]
        step[expert, :E] = rise_EN[np.arange(E), cheapest_E]
        step[expert, expert] = np.inf

    for expert in range(E):
        look(expert)
    while (size_E - base - extra_E > 0).any():
        over_E = size_E - base - extra_E
        cost, before = _shortest(step, np.append(over_E > 0, False), tolerance)
        place = int(np.where(np.append(over_E < 0, extra_E.sum() < spare), cost, np.inf).argmin())
        changed = set()
        while before[place] >= 0:
            giver, taker = int(before[place]), place
            if taker == E:
                extra_E[giver], step[giver, E], step[E, giver] = 1, np.inf, 0
            elif giver == E:
                extra_E[taker], step[taker, E], step[E, taker] = 0, 0, np.inf
            else:
                labels_F[mover_EE[giver, taker]] = taker
                size_E[giver] -= 1
                size_E[taker] += 1
                changed |= {giver, taker}
            place = giver
        for expert in changed:
            look(expert)
    return labels_F, price_E


def _priced(cost_EF: np.ndarray, price_E: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of least cost and price for each neuron, at prices that give every expert about `base`; the prices."""
    priced_EF = cost_EF + price_E[:, None]
    for _ in range(SWEEPS):
        for expert, cost_F in enumerate(cost_EF):
            priced_EF[expert] = np.inf
            # What a neuron would pay to be here rather than where it is next cheapest: `base` of them are to come.
            worth_F = priced_EF.min(0) - cost_F
            cut = len(worth_F) - base
            priced_EF[expert] = cost_F + np.partition(worth_F, (cut - 1, cut))[cut - 1 : cut + 1].mean()
    return priced_EF.argmin(0), priced_EF[:, 0] - cost_EF[:, 0]


def _shortest(step: np.ndarray, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Cost of the cheapest path to each node from any of `start`, and the node before it, -1 at the start.

    Bellman and Ford; steps may be negative, but there are no negative cycles.
    """
    cost = np.where(start, 0.0, np.inf)
    before = np.full(len(cost), -1)
    for _ in range(len(cost)):
        through = cost[:, None] + step
        nearest = through.argmin(0)
        reached = through[nearest, np.arange(len(cost))]
        better = reached < cost - tolerance
        if not better.any():
            break
        cost[better], before[better] = reached[better], nearest[better]
    return cost, before


def super_neurons(largest: Sequence[Tensor]) -> list[Tensor]:
    """The neurons of each layer that make massive activations, in order, from the largest contributions [F] of each.

    Those above the 99.9th percentile of all the model's neurons, and above a tenth of the largest, as Super Experts
    are told from others (arXiv 2507.23279): few, and without them a model says nothing of use.
    """
    every = torch.cat(list(largest)).double()
    above = max(torch.quantile(every, SUPER_QUANTILE).item(), SUPER_SHARE * every.max().item())
    return [torch.nonzero(largest_F.double() > above).flatten() for largest_F in largest]


def shared_by_energy(
    ffn: DenseFFN, statistics: NeuronStatistics, shared_width: int, guarded: Tensor | None = None
) -> Tensor:
    """The S neurons that carry most of the FFN's output, for the shared expert, [S] in order; `guarded` are among them.

    By expected output energy (CMoE, arXiv 2502.04416), as DeepSeekMoE (arXiv 2401.06066) isolates shared experts.
    ValueError if S are too few for the guarded.
    """
    energy_F = statistics.energy(ffn)
    if guarded is not None:
        if len(guarded) > shared_width:
            raise ValueError(
                f"{len(guarded)} neurons are guarded and the shared expert holds {shared_width}: make it as wide"
            )
        energy_F[guarded] = torch.inf
    return energy_F.topk(shared_width).indices.sort().values


def partition_with_shared(
    method: PartitionMethod,
    ffn: DenseFFN,
    statistics: NeuronStatistics,
    num_experts: int,
    seed: int,
    shared_width: int,
    guarded: Tensor | None = None,
) -> Tensor:
    """The expert of each neuron, [F] int64, -1 for those of the shared expert; the rest by the named method.

    The neurons `guarded` always belong to the shared expert.
    """
    if shared_width == 0 and (guarded is None or len(guarded) == 0):
        return partition(method, ffn, statistics, num_experts, seed)
    routed_F = torch.ones(ffn.ffn_width, dtype=torch.bool)
    routed_F[shared_by_energy(ffn, statistics, shared_width, guarded)] = False
    rest_R = routed_F.nonzero().flatten()
    expert_of_neuron_F = torch.full((ffn.ffn_width,), -1, dtype=torch.int64)
    expert_of_neuron_F[rest_R] = partition(method, ffn.narrow(rest_R), statistics.narrow(rest_R), num_experts, seed)
    return expert_of_neuron_F


def partition(
    method: PartitionMethod, ffn: DenseFFN, statistics: NeuronStatistics | None, num_experts: int, seed: int
) -> Tensor:
    """The expert of each neuron, [F] int64, by the named method.

    `coactivation` and `nested` need statistics, `gradient` those of importance to E groups; ValueError without.
    """
    if method == "contiguous":
        return contiguous(ffn.ffn_width, num_experts)
    if method == "random":
        return random(ffn.ffn_width, num_experts, seed)
    if method == "weights":
        return weights(ffn, num_experts, seed)
    if method not in get_args(PartitionMethod):
        raise ValueError(f"partition {method!r} is not one of {', '.join(get_args(PartitionMethod))}")
    if statistics is None or statistics.tokens == 0:
        raise ValueError(f"the {method} partition needs activation statistics: give it calibration text")
    if method == "coactivation":
        return coactivation(statistics, num_experts, seed)
    if method == "nested":
        return nested(statistics.energy(ffn), num_experts)
    if len(statistics.members_G) != num_experts:
        raise ValueError(
            f"the gradient partition into {num_experts} experts needs the neurons' importance to as many groups of "
            "tokens, from a backward pass through the whole model; where there is none, use coactivation"
        )
    return gradient(statistics.importance())
