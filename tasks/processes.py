"""A stage in several processes: it starts them by torchrun's own launcher, or is one of those that torchrun started."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from tasks.record import STAGE_RUN
from tasks.stage import USER_ERROR, StageRun, explain

if TYPE_CHECKING:
    from ffn2moe.data.ranks import Ranks

PATIENCE = timedelta(minutes=30)  # before a process that is waited for is taken for lost
GRACE = 10.0  # seconds that a process which has lost the others leaves them to say why


def launched() -> bool:
    """Whether torchrun, or `launch`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def speaks() -> bool:
    """Whether this process keeps the record of the run: it is the only one, or the first."""
    return os.environ.get("RANK", "0") == "0"


def launch(stage: StageRun, processes: int, *program: str) -> None:
    """Runs `python PROGRAM` in so many processes on this machine, which talk over its loopback and share its cores.

    ChildProcessError with the first one's reason when one fails or is killed; the others are ended then, as they are
    when this process is stopped.
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
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it would tell of a failure is told below
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
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                reason = (
                    f"was killed ({name}; if nobody did it, the memory ran out: dmesg tells); run again: training goes "
                    "on from its last checkpoint"
                )
            elif failure.exitcode == USER_ERROR and isinstance(failure.message, dict):
                reason = f"stopped: {failure.message['message'].partition(': ')[2]}"
            else:
                reason = f"failed with code {failure.exitcode}: what it printed above says why"
            raise ChildProcessError(f"process {rank} of {processes} {reason}") from None


def take_part(stage: StageRun, work: Callable[[StageRun, Ranks], None], *, device: str, patience: timedelta) -> None:
    """Does `work` as one of the processes that torchrun started; the first one speaks for all.

    What went wrong is left to whoever started the processes to tell, once.
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
