"""Run a stage in several processes: start them with torchrun's launcher, or be one that torchrun started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tasks.record import STAGE_RUN
from tasks.stage import USER_ERROR, StageRun, explain

if TYPE_CHECKING:
    from ffn2moe.data.ranks import Ranks

PATIENCE = timedelta(minutes=30)  # how long the others wait for a process before they count it as lost
GRACE = 10.0  # seconds that a process which lost the others waits, so that they can say why


def launched() -> bool:
    """Return whether torchrun, or `launch`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks() -> bool:
    """Return whether this process keeps the record of the run: the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def launch(stage: StageRun, processes: int, *program: str) -> None:
    """Run `python PROGRAM` in several processes on this machine, which talk over its loopback and share its cores.

    ChildProcessError, with the first reason, if one fails or is killed. The others end then, and also when this process
    is stopped.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    here = "127.0.0.1"
    threads = max(1, torch.get_num_threads() // processes)
    os.environ.update({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if stage.record:
        os.environ[STAGE_RUN] = stage.record.run_id
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the error below says why a process failed
    stage.say(f"{processes} processes, {threads} thread{'s' if threads > 1 else ''} each")
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=stage.name,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{here}:0",
            local_addr=here,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)(*program)
        except SignalException as stop:
            sys.exit(128 + stop.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise ChildProcessError(f"process {rank} of {processes} {_reason(failure)}") from None


def _reason(failure: Any) -> str:
    """Return how a process failed, and what to do, from torchrun's record of it."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return (
            f"was killed ({name}; if nobody killed it, the memory ran out: see dmesg); run again: the training resumes "
            "from its last checkpoint"
        )
    if failure.exitcode == USER_ERROR and isinstance(failure.message, dict):
        return f"stopped: {failure.message['message'].partition(': ')[2]}"
    return f"failed with code {failure.exitcode}: its output above says why"


def take_part(stage: StageRun, work: Callable[[StageRun, Ranks], None], *, device: str, patience: timedelta) -> None:
    """Do `work` as one of the processes that torchrun started; only the first one prints.

    An error goes to the process that started them, which reports it once.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from ffn2moe.data.ranks import joined

    if stage.params.compute.threads:
        torch.set_num_threads(max(1, stage.params.compute.threads // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        with joined(device, patience) as ranks:
            work(stage if ranks.first else StageRun(stage.name, stage.params, stage.root, quiet=True), ranks)
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        get_error_handler().record_exception(ValueError(message))
        if isinstance(error, ConnectionError):
            time.sleep(GRACE)
        sys.exit(USER_ERROR)
