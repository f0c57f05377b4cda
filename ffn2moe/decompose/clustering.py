"""Cluster neurons, or tokens, into groups of equal size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffn2moe.numerics import WIDEST_MOMENTS

MOST_DIMENSIONS = 256  # dimensions of the points that the clustering of a wide FFN reads
STARTS = 8  # runs of the clustering of other FFNs
SETTLED = 1e-4  # share of the mean variance: clustering ends when the centres move by less
SWEEPS = 2  # over the experts, to find their prices


def balanced_kmeans(points_FP: Tensor, num_experts: int, seed: int) -> Tensor:
    """Return the cluster of each point, [F] int64, by k-means with clusters whose sizes differ by one at most.

    Clusters are numbered in the order of their first points. Lloyd's algorithm assigns points in the best way for these
    sizes (`balanced_assignment`; Bradley, Bennett & Demiriz 2000). It starts from k-means++; where a run is short it
    takes the best of several starts.
    """
    from sklearn.cluster import kmeans_plusplus

    count = len(points_FP)
    wide = count > WIDEST_MOMENTS  # then a run takes seconds, and its last steps gain little
    if wide and points_FP.shape[1] > MOST_DIMENSIONS:
        # A random projection keeps distances, and so the cost of every clustering (Johnson & Lindenstrauss 1984).
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
    """Return balanced clusters of centred points, [F] int64, from these first centres, and their sum of squares."""
    enough = SETTLED * points_FP.var(0, correction=0).mean().item()
    energy = points_FP.square().sum().item()
    price_E = np.zeros(len(centre_EP))
    for _ in range(most_steps):
        # Squared distances to the centres, without the squared norm of the point: it is the same for all of them.
        cost_EF = centre_EP.square().sum(1, keepdim=True) - 2 * centre_EP @ points_FP.T
        labels, price_E = balanced_assignment(cost_EF.numpy(), price_E)
        member_EF = F.one_hot(torch.from_numpy(labels), len(centre_EP)).T.double()
        size_E1 = member_EF.sum(1, keepdim=True)
        before_EP, centre_EP = centre_EP, member_EF @ points_FP / size_E1
        if (centre_EP - before_EP).square().sum().item() <= enough:
            break
    return labels, energy - (size_E1 * centre_EP.square()).sum().item()


def balanced_assignment(cost_EF: np.ndarray, price_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cheapest assignment of F neurons to E experts of equal size, [F] int64, and the prices of the experts.

    Sizes differ by one at most. This solves a minimum-cost flow exactly. `price_E` is a guess of the price of a place
    in each expert, such as the prices of a similar problem; it changes the time and, except for ties, nothing else.
    First the prices are set so that sizes are almost right, and each neuron takes the expert of least cost plus price:
    the optimum for the sizes that result. Then neurons move along the cheapest path from an expert with too many to one
    with too few, which keeps the optimum (successive shortest paths; Ahuja, Magnanti & Orlin 1993, chapter 9.7). An
    edge of the path is the neuron that is cheapest to move, so the graph has one node for each expert, and one for the
    F mod E places that make an expert wider than the others.
    """
    E, count = cost_EF.shape
    if E == 1:
        return np.zeros(count, dtype=np.int64), price_E
    base, spare = divmod(count, E)
    labels_F, price_E = _priced(cost_EF, price_E, base)
    flow = _Flow(cost_EF, labels_F)
    extra_E = np.zeros(E, dtype=np.int64)  # 1 where an expert has one of the spare places
    while ((over_E := flow.size_E - base - extra_E) > 0).any():
        cost, before = _shortest(flow.step, np.append(over_E > 0, False), flow.tolerance)
        place = int(np.where(np.append(over_E < 0, extra_E.sum() < spare), cost, np.inf).argmin())
        changed = set()
        while before[place] >= 0:
            giver, taker = int(before[place]), place
            if taker == E:
                extra_E[giver], flow.step[giver, E], flow.step[E, giver] = 1, np.inf, 0
            elif giver == E:
                extra_E[taker], flow.step[taker, E], flow.step[E, taker] = 0, 0, np.inf
            else:
                flow.move(giver, taker)
                changed |= {giver, taker}
            place = giver
        for expert in changed:
            flow.update(expert)
    return labels_F, price_E


class _Flow:
    """The graph of `balanced_assignment`: one node for each expert, the last node for the spare places."""

    def __init__(self, cost_EF: np.ndarray, labels_F: np.ndarray) -> None:
        E = len(cost_EF)
        self.cost_EF, self.labels_F = cost_EF, labels_F
        self.size_E = np.bincount(labels_F, minlength=E)
        self.step = np.full(
            (E + 1, E + 1), np.inf
        )  # cost of one neuron less in the row's node, one more in the column's
        self.step[:E, E] = 0
        self.mover_EE = np.zeros((E, E), dtype=np.int64)  # the neuron that is cheapest to move
        self.tolerance = 1e-12 * np.abs(cost_EF).max(initial=0)
        for expert in range(E):
            self.update(expert)

    def update(self, expert: int) -> None:
        """Find the neuron of an expert that is cheapest to move to each other expert."""
        E = len(self.cost_EF)
        members = np.flatnonzero(self.labels_F == expert)
        if len(members) == 0:
            self.step[expert, :E] = np.inf
            return
        rise_EN = self.cost_EF[:, members] - self.cost_EF[expert, members]
        cheapest_E = rise_EN.argmin(1)
        self.mover_EE[expert] = members[cheapest_E]
        self.step[expert, :E] = rise_EN[np.arange(E), cheapest_E]
        self.step[expert, expert] = np.inf

    def move(self, giver: int, taker: int) -> None:
        """Move the cheapest neuron from one expert to another."""
        self.labels_F[self.mover_EE[giver, taker]] = taker
        self.size_E[giver] -= 1
        self.size_E[taker] += 1


def _priced(cost_EF: np.ndarray, price_E: np.ndarray, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the expert of least cost plus price for each neuron, at prices that give each expert about `base`."""
    priced_EF = cost_EF + price_E[:, None]
    for _ in range(SWEEPS):
        for expert, cost_F in enumerate(cost_EF):
            priced_EF[expert] = np.inf
            # How much more the cheapest other expert costs a neuron: this one shall get `base` of them.
            worth_F = priced_EF.min(0) - cost_F
            cut = len(worth_F) - base
            priced_EF[expert] = cost_F + np.partition(worth_F, (cut - 1, cut))[cut - 1 : cut + 1].mean()
    return priced_EF.argmin(0), priced_EF[:, 0] - cost_EF[:, 0]


def _shortest(step: np.ndarray, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the cost of the cheapest path to each node from any of `start`, and the node before it (-1 at a start).

    This is Bellman-Ford: steps may be negative, and there are no negative cycles.
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
