"""Run jobs on single layers: in this process, in others, or on other machines.

A job is complete in itself: its kind, its settings as JSON and its tensors make one safetensors file, and its result is
another. So a job runs in this process (`here`), in others on this machine (`in_processes`), or wherever a program takes
the file (`by_command`). Each job runs in one thread and gives the same bits in every place.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

import ffn2moe

SECONDS_BETWEEN_LOOKS = 0.05
AHEAD = 2  # jobs of a process that lie in files: the one it does, and the next
FEWEST_NUMBERS = 2**24  # of the jobs together: with fewer, processes cost more (3 s each) than they save

# Kind of a job -> the function that does it: LayerJob -> LayerResult.
KINDS = {
    "decompose": "ffn2moe.decompose.jobs:do_decompose",
    "judge": "ffn2moe.decompose.jobs:do_judge",
    "widths": "ffn2moe.decompose.jobs:do_widths",
    "route": "ffn2moe.decompose.jobs:do_route",
    "distil": "ffn2moe.distill.layerwise:distillation",
}


@dataclass(frozen=True)
class LayerResult:
    """Hold the result of one layer: a summary, as JSON keeps it, and tensors."""

    layer: int
    summary: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the result as a safetensors file."""
        return save(_plain(self.tensors), {"layer": str(self.layer), "summary": json.dumps(self.summary)})


class Job(Protocol):
    """The work on one layer, complete in itself, so that another process can do it."""

    @property
    def layer(self) -> int: ...

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors of the job by name."""
        ...

    def shell(self) -> Any:
        """Return the job without the contents of its tensors."""
        ...

    def filled(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return the same job with these tensors."""
        ...

    def done(self) -> LayerResult:
        """Do the job; return its result."""
        ...


@dataclass(frozen=True)
class LayerJob:
    """A job of one of the `KINDS`. Settings hold values that JSON keeps."""

    kind: str
    layer: int
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, named without it."""
        return under(prefix, self.tensors)

    def parts(self) -> dict[str, Tensor]:
        """Return all tensors of the job by name."""
        return self.tensors

    def shell(self) -> LayerJob:
        """Return the job without its tensors."""
        return replace(self, tensors={})

    def filled(self, tensors: Mapping[str, Tensor]) -> LayerJob:
        """Return the same job with these tensors."""
        return replace(self, tensors=dict(tensors))

    def done(self) -> LayerResult:
        """Do the job; return its result. ValueError for an unknown kind."""
        if self.kind not in KINDS:
            raise ValueError(f"no worker knows the job {self.kind!r}: it is none of {', '.join(KINDS)}")
        module, function = KINDS[self.kind].split(":")
        return getattr(importlib.import_module(module), function)(self)

    def save(self, path: str | Path) -> None:
        """Write the job as a safetensors file, with the versions that made it."""
        about = {name: getattr(self, name) for name in ("kind", "layer", "settings", "deterministic")}
        save_file(_plain(self.tensors), path, {"job": json.dumps(about), "made_with": json.dumps(made_with())})

    @classmethod
    def load(cls, path: str | Path) -> LayerJob:
        """Read a file of `save`. ValueError where this process would come to another result than the writer."""
        with safe_open(path, framework="pt") as file:
            require_the_same(json.loads(file.metadata()["made_with"]))
            about = json.loads(file.metadata()["job"])
            return cls(tensors={name: file.get_tensor(name) for name in file.keys()}, **about)  # noqa: SIM118


LayerMap = Callable[[Sequence[LayerJob]], Iterator[LayerResult]]


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors keeps them: whole, none a part of another."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


# --- the same result in every place -------------------------------------------------------------------------------


@cache
def made_with() -> dict[str, str]:
    """Return what bits depend on besides the job: this package's code, torch, and the processor's instructions."""
    code = hashlib.sha256()
    for path in sorted(Path(ffn2moe.__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "ffn2moe": ffn2moe.__version__,
        "code of ffn2moe": code.hexdigest()[:12],
        "torch": torch.__version__,
        "processor": torch.backends.cpu.get_cpu_capability() + " amx" * torch.cpu._is_amx_tile_supported(),
    }


def require_the_same(theirs: Mapping[str, str]) -> None:
    """Raise ValueError where a job was made with other versions than this process has."""
    ours = made_with()
    other = [name for name in ours if theirs.get(name) != ours[name]]
    if other:
        differences = "; ".join(
            f"{name}: {ours[name]} here, {theirs.get(name)} where the job comes from" for name in other
        )
        raise ValueError(
            f"this worker would come to other results ({differences}): install the same versions on all machines, or "
            "stop the worker"
        )


def do_bytes(data: bytes) -> bytes:
    """Do the job in a safetensors file; return the result as another. For workers that get no files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.safetensors"
        path.write_bytes(data)
        job = LayerJob.load(path)
        return _done(job, job.deterministic).to_bytes()


_one_at_a_time = threading.Lock()  # threads, precision and determinism are settings of the process


def _done(job: Job, deterministic: bool) -> LayerResult:
    with _one_at_a_time, _one_thread():
        before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            return job.done()
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- where --------------------------------------------------------------------------------------------------------


def here(jobs: Iterable[Job]) -> Iterator[LayerResult]:
    """Do the jobs in this process, one after another."""
    for job in jobs:
        yield _done(job, torch.are_deterministic_algorithms_enabled())


def on_this_machine(jobs: Sequence[LayerJob], workers: int) -> Iterator[LayerResult]:
    """Do the jobs in so many processes, or here where they are too little work."""
    numbers = sum(tensor.numel() for job in jobs for tensor in job.tensors.values())
    workers = min(workers, len(jobs))
    return here(jobs) if workers < 2 or numbers < FEWEST_NUMBERS else in_processes(jobs, workers)


def in_processes(jobs: Sequence[Job], workers: int, folder: str | Path | None = None) -> Iterator[LayerResult]:
    """Do the jobs in so many processes at once; yield each result when it is done.

    Processes are spawned, not forked: threads do not survive a fork. Each reads its tensors from files in `folder`,
    because shared memory is small in containers; no more than `AHEAD` of its jobs are there at once. They end with this
    process. ChildProcessError, with the layer, for an error in one of them.
    """
    context = multiprocessing.get_context("spawn")
    deterministic = torch.are_deterministic_algorithms_enabled()
    with tempfile.TemporaryDirectory(dir=folder) as orders:
        shares = [list(jobs[start::workers]) for start in range(workers)]
        unwritten: dict[int, Iterator[Job]] = {}
        for share in shares:
            rest = iter(share)
            unwritten |= {job.layer: rest for job in share}
            for job in islice(rest, AHEAD):
                _give(job, orders)
        processes = []
        for number, share in enumerate(shares):
            arguments = ([job.shell() for job in share], orders, number, deterministic, os.getpid())
            processes.append(context.Process(target=_work, args=arguments, daemon=True))
        waiting = {job.layer for job in jobs}
        try:
            for process in processes:
                process.start()
            while waiting:
                ended = [number for number, process in enumerate(processes) if process.exitcode is not None]
                for result in _arrived(orders, waiting):
                    for job in islice(unwritten[result.layer], 1):
                        _give(job, orders)
                    yield result
                for number in ended:
                    if left := [job.layer for job in shares[number] if job.layer in waiting]:
                        raise _failure(Path(orders) / f"worker-{number}.error", left, processes[number].exitcode)
                if waiting:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
                if process.pid is not None:
                    process.join()


def by_command(
    command: Sequence[str], jobs: Sequence[LayerJob], *, cwd: str | Path | None = None, folder: str | Path | None = None
) -> Iterator[LayerResult]:
    """Have a program do the jobs; yield each result when it is done.

    The program gets a folder as its last argument, does every ``layer-N.job`` in it (`do_bytes`) and writes the result
    beside it as ``layer-N.done``, whole at once (`deliver`). ChildProcessError, with the last line of its standard
    error, where it ends otherwise. The program is stopped when the caller stops reading results.
    """
    with tempfile.TemporaryDirectory(dir=folder) as orders:
        for job in jobs:
            job.save(_order(orders, job.layer))
        waiting = {job.layer for job in jobs}
        with open(Path(orders) / "said", "w+") as said:
            process = subprocess.Popen([*command, orders], cwd=cwd, stdin=subprocess.DEVNULL, stderr=said)
            try:
                while waiting:
                    ended = process.poll() is not None
                    yield from _arrived(orders, waiting)
                    if waiting and ended:
                        said.seek(0)
                        lines = said.read().strip().splitlines() or [f"it ended with {process.returncode}"]
                        raise ChildProcessError(lines[-1].removeprefix("error: "))
                    if waiting:
                        time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                if waiting:
                    process.terminate()
                process.wait()


def orders_in(folder: str | Path) -> dict[int, Path]:
    """Return layer -> file for every job in a folder."""
    return {int(path.stem.removeprefix("layer-")): path for path in sorted(Path(folder).glob("layer-*.job"))}


def deliver(folder: str | Path, layer: int, data: bytes) -> None:
    """Write the result of a layer where `by_command` waits for it, whole at once."""
    final = Path(folder) / f"layer-{layer}.done"
    partial = final.with_suffix(".partial")
    partial.write_bytes(data)
    os.replace(partial, final)


def _order(orders: str, layer: int) -> Path:
    return Path(orders) / f"layer-{layer}.job"


def _give(job: Job, orders: str) -> None:
    """Write a job where its process waits for it, whole at once."""
    final = _order(orders, job.layer)
    partial = final.with_suffix(".unready")
    save_file(_plain(job.parts()), partial)
    os.replace(partial, final)


def _taken(path: Path, parent: int) -> dict[str, Tensor] | None:
    """Return the tensors of a job when they are there; None when nobody is left who writes them."""
    while not path.is_file():
        if os.getppid() != parent:
            return None
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return load_file(path)


def _arrived(orders: str, waiting: set[int]) -> Iterator[LayerResult]:
    """Yield the results that have arrived, and remove their layers from `waiting`."""
    for layer in sorted(waiting):
        path = Path(orders) / f"layer-{layer}.done"
        if path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    summary = json.loads(file.metadata()["summary"])
                result = LayerResult(layer, summary, load_file(path))
            except SafetensorError as error:
                raise ChildProcessError(f"what came back of layer {layer} cannot be read: {error}") from None
            _order(orders, layer).unlink()
            path.unlink()
            waiting.remove(layer)
            yield result


def _failure(said: Path, layers: Sequence[int], exit_code: int | None) -> ChildProcessError:
    left = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    if said.is_file():
        return ChildProcessError(f"the worker that was to do {left} failed: {said.read_text()}")
    return ChildProcessError(
        f"the worker that was to do {left} ended with exit code {exit_code} and said nothing: if memory ran out, "
        "use fewer workers"
    )


def _work(shells: Sequence[Any], orders: str, worker: int, deterministic: bool, parent: int) -> None:
    """Do the jobs of one process of `in_processes`."""
    try:
        for shell in shells:
            tensors = _taken(_order(orders, shell.layer), parent)
            if tensors is None:
                return
            result = _done(shell.filled(tensors), deterministic)
            if os.getppid() != parent:  # nobody is left who waits for the rest
                return
            deliver(orders, shell.layer, result.to_bytes())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        (Path(orders) / f"worker-{worker}.error").write_text(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error
