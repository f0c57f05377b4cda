"""The processes that train one model together, each on its part of every batch.

Two conventions make a step of several processes the step of one, up to rounding. A loss is a sum over processes: what
one of them works out from its texts, divided by what is counted over all. And what compares texts with each other sees
all of them (`Ranks.gather`), so that it is the same loss however the batch is divided.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process, number `rank` of `size`. Of one process alone (`ALONE`) every method gives what it got.

    All methods but `part` are answered when every process has called them, in the same order. ConnectionError when
    one of the others is gone.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of `count` things in order are this process's: equal parts, the first ones by one longer."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, without gradient; the same bits for all of them."""
        return tensor if self.size == 1 else self._reduced(tensor.detach().clone(), dist.ReduceOp.SUM)

    def total(self, count: int) -> int:
        """The sum of a number over the processes."""
        return count if self.size == 1 else int(self.sum(torch.tensor(count, device=self.device)).item())

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, n differing, in the order of the processes: [N, ...], with gradient."""
        if self.size == 1:
            return rows
        place, total = self.place(len(rows))
        gathered: Tensor = _Gather.apply(rows, self, place, total)
        return gathered

    def place(self, count: int) -> tuple[slice, int]:
        """Where this process's `count` rows lie among those that `gather` gives, and how many these are."""
        if self.size == 1:
            return slice(0, count), count
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = count
        found = self.sum(counts).tolist()
        start = sum(found[: self.rank])
        return slice(start, start + count), sum(found)

    def same(self, numbers: Tensor) -> bool:
        """Whether all processes have these very integers."""
        if self.size == 1:
            return True
        numbers = numbers.to(self.device)
        low = self._reduced(numbers.clone(), dist.ReduceOp.MIN)
        return torch.equal(low, self._reduced(numbers.clone(), dist.ReduceOp.MAX))

    def from_first(self, step: int, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """What the first process has: a step, and tensors by name. The others' own are not looked at."""
        if self.size == 1:
            return step, dict(tensors)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        told: list[Any] = [step, shapes]
        received = {}
        with _together(self):
            dist.broadcast_object_list(told, src=0, device=self.device)
            for name, (shape, dtype) in told[1].items():
                empty = torch.empty(shape, dtype=dtype, device=self.device)
                received[name] = tensors[name].detach().to(self.device).contiguous() if self.first else empty
                dist.broadcast(received[name], src=0)
        return told[0], received

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        with _together(self):
            dist.all_reduce(tensor, operation)
        return tensor


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    """Rows of all processes; each gets back the sum of the gradients that all of them have for its own."""

    @staticmethod
    def forward(context: Any, rows: Tensor, ranks: Ranks, place: slice, total: int) -> Tensor:
        context.ranks, context.place = ranks, place
        gathered = rows.new_zeros(total, *rows.shape[1:])
        gathered[place] = rows
        return ranks.sum(gathered)  # every row is one process's, and 0 for the others: nothing is rounded

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return context.ranks.sum(gradient.contiguous())[context.place], None, None, None


@contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    """Says plainly that the others are gone, for which each backend has words of its own."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"process {ranks.rank} of {ranks.size} has lost the others: one of them failed or was killed, which it "
            "says itself, or the network between them broke; run again: training goes on from its last checkpoint"
        ) from error


@contextmanager
def joined(device: str, patience: timedelta) -> Iterator[Ranks]:
    """The processes that torchrun started, of which this is one; each has an accelerator of its own, if not a CPU.

    `patience` is how long a process waits for the others before it takes them for lost. ValueError where there are
    fewer accelerators on this machine than processes.
    """
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.device(device).type != "cpu":
        if here > torch.accelerator.device_count():
            raise ValueError(
                f"{here} processes on a machine with {torch.accelerator.device_count()} accelerators: each needs one "
                "of its own; start fewer here, or compute on the cpu"
            )
        torch.accelerator.set_device_index(local)
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=patience)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
    finally:
        dist.destroy_process_group()
