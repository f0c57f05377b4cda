"""Let several processes train one model together, each on its part of every batch.

Two conventions make a step of several processes equal to that of one, up to rounding. A loss is a sum over processes:
each divides the sum over its texts by the count over all texts. A loss that compares texts with each other sees all of
them (`Ranks.gather`), so that it does not depend on how the batch is split.
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
    """This process, number `rank` of `size`. With one process (`ALONE`) every method returns its argument.

    All methods except `part` return when every process has called them, in the same order. ConnectionError if another
    process has ended.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and messages for all."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return the slice of `count` items that this process has: equal parts, the first ones longer by one."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes, without gradient; all of them get the same bits."""
        return tensor if self.size == 1 else self._reduced(tensor.detach().clone(), dist.ReduceOp.SUM)

    def total(self, count: int) -> int:
        """Return the sum of a number over the processes."""
        return count if self.size == 1 else int(self.sum(torch.tensor(count, device=self.device)).item())

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [n, ...] of all processes (n may differ) in their order: [N, ...], with gradient."""
        if self.size == 1:
            return rows
        place, total = self.place(len(rows))
        gathered: Tensor = _Gather.apply(rows, self, place, total)
        return gathered

    def place(self, count: int) -> tuple[slice, int]:
        """Return the slice of this process's `count` rows in the result of `gather`, and the length of the result."""
        if self.size == 1:
            return slice(0, count), count
        counts = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        counts[self.rank] = count
        found = self.sum(counts).tolist()
        start = sum(found[: self.rank])
        return slice(start, start + count), sum(found)

    def same(self, numbers: Tensor) -> bool:
        """Return whether all processes have the same integers."""
        if self.size == 1:
            return True
        numbers = numbers.to(self.device)
        low = self._reduced(numbers.clone(), dist.ReduceOp.MIN)
        return torch.equal(low, self._reduced(numbers.clone(), dist.ReduceOp.MAX))

    def from_first(self, step: int, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """Return the step and the tensors of the first process; those of the others are ignored."""
        if self.size == 1:
            return step, dict(tensors)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        message: list[Any] = [step, shapes]
        received = {}
        with _together(self):
            dist.broadcast_object_list(message, src=0, device=self.device)
            for name, (shape, dtype) in message[1].items():
                empty = torch.empty(shape, dtype=dtype, device=self.device)
                received[name] = tensors[name].detach().to(self.device).contiguous() if self.first else empty
                dist.broadcast(received[name], src=0)
        return message[0], received

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        with _together(self):
            dist.all_reduce(tensor, operation)
        return tensor


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    """Gather the rows of all processes; backward gives each the sum of all gradients of its own rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor, ranks: Ranks, place: slice, total: int) -> Tensor:
        context.ranks, context.place = ranks, place
        gathered = rows.new_zeros(total, *rows.shape[1:])
        gathered[place] = rows
        return ranks.sum(gathered)  # exact: a row is zero in all processes but one

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return context.ranks.sum(gradient.contiguous())[context.place], None, None, None


@contextmanager
def _together(ranks: Ranks) -> Iterator[None]:
    """Raise ConnectionError, with the remedy, instead of the backend's error if another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"process {ranks.rank} of {ranks.size} has lost the others: one of them failed (see its own "
            "message) or was killed, or the network broke. Run again: training resumes from its last checkpoint"
        ) from error


@contextmanager
def joined(device: str, patience: timedelta) -> Iterator[Ranks]:
    """Join the processes that torchrun started. On accelerators each process takes one of its own.

    A process waits `patience` for the others before it takes them for lost. ValueError where this machine has fewer
    accelerators than processes.
    """
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.device(device).type != "cpu":
        if here > torch.accelerator.device_count():
            raise ValueError(
                f"{here} processes on a machine with {torch.accelerator.device_count()} accelerators: each process "
                "needs one: start fewer, or compute on the CPU"
            )
        torch.accelerator.set_device_index(local)
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=patience)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))
    finally:
        dist.destroy_process_group()
