"""Report errors of the flows on the command line."""

from __future__ import annotations

import os
import signal
import sys

from flows.workspace import FlowError
from tasks.stage import explain

STOPPED = "Stopped. Finished stages are kept; run the same command again to resume."


def report(error: Exception, message: str | None = None) -> int:
    """Print an error that a user can act on, and return 2; raise a bug, or with FFN2MOE_DEBUG every error."""
    if message is None:
        message = str(error) if isinstance(error, FlowError) else explain(error)
    if message is None or os.environ.get("FFN2MOE_DEBUG"):
        raise error
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return 2


def stop_on_terminate() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that it stops its children."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
