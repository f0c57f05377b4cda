"""Serve a version of the registry over HTTP, by `mlflow models serve` in this environment.

    python -m flows.serve [--model NAME] [--version N | --alias NAME] [--port N]

It listens on loopback unless --host says otherwise. Errors come before anything starts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from flows.environment import settle
from flows.errors import report, stop_on_terminate
from flows.workspace import FlowError
from tasks.params import load_params
from tasks.registry import CHAMPION, Registry
from tasks.stage import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
PORT = 5001
PATIENCE = 300.0  # seconds a model may take to answer; it takes 4, on a busy machine much more
SECONDS_A_REQUEST = 120.0
console = Console(highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Server:
    """Hold the address of a served version, and the process of `mlflow models serve`."""

    url: str
    process: subprocess.Popen[bytes]

    def ask(self, texts: Any, **params: Any) -> tuple[int, dict[str, Any]]:
        """Return HTTP status and answer to a request; see `ask`."""
        return ask(self.url, {"inputs": texts, **({"params": params} if params else {})})

    def processes(self) -> list[psutil.Process]:
        """Return the process of MLflow and the server that it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def ask(url: str, payload: Any) -> tuple[int, dict[str, Any]]:
    """Post a request to a served model; return HTTP status and answer. FlowError if nothing answers."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    request = urllib.request.Request(f"{url}/invocations", body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS_A_REQUEST) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        return error.code, json.loads(text) if text.startswith("{") else {"message": text}
    except OSError as error:
        cause = getattr(error, "reason", error)
        raise FlowError(f"no served model answers at {url} ({cause}); start one: make serve") from None


def answers(url: str) -> bool:
    """Return whether a served model answers /ping."""
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@contextmanager
def served(
    registry: Registry, version: int, *, host: str = HOST, port: int | None = None, log: Path | None = None
) -> Iterator[Server]:
    """Serve a version while the block runs, on a free port unless one is given.

    Its output goes to `log`, or to this terminal. FlowError if it does not come up.
    """
    port = port or free_port(host)
    require_free(host, port)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{registry.model}/{version}"]
    stream = log.open("wb") if log else None
    process = subprocess.Popen(
        [*command, "--env-manager", "local", "--host", host, "--port", str(port)],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": registry.uri,
            "MLFLOW_REGISTRY_URI": registry.uri,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        },
        stdout=stream,
        stderr=stream,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    server = Server(f"http://{host}:{port}", process)
    try:
        _wait(server, log)
        yield server
    finally:
        _stop(process)
        if stream:
            stream.close()


def _wait(server: Server, log: Path | None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not answers(server.url):
        ended = server.process.poll() is not None
        if ended or time.monotonic() > deadline:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:] if log else []
            raise FlowError(
                f"the model at {server.url} "
                + ("stopped before it answered" if ended else f"did not answer within {PATIENCE:.0f} s")
                + (f"; its last lines: {' | '.join(lines)}" if lines else "; see its output above")
            )
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process of MLflow and the server that it started, and wait for both."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            if not psutil.wait_procs(started, timeout=10)[1]:
                break
    process.wait()


def free_port(host: str = HOST) -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raise FlowError unless the port is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FlowError(
                f"port {port} of {host} cannot be used ({error.strerror}); stop its process, or take another port: "
                f"make serve PORT={port + 1}"
            ) from None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a registered version."""
    parser.add_argument("--model", help="name of the registered model; default: from params.yaml")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--alias", default=CHAMPION, help="default: champion")
    which.add_argument("--version", help="number of a version")


def registry_of(options: argparse.Namespace) -> Registry:
    """Return the registry of the model that the options name."""
    return Registry(ROOT, options.model or load_params(ROOT / "params.yaml").model_name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--host", default=HOST, help=f"default: {HOST}, this machine alone")
    parser.add_argument("--port", type=int, default=PORT, help=f"default: {PORT}")
    options = parser.parse_args(arguments)
    settle(ROOT)
    stop_on_terminate()
    try:
        require_free(options.host, options.port)
        registry = registry_of(options)
        version = registry.resolve(options.version or options.alias)
        with served(registry, version, host=options.host, port=options.port) as server:
            console.print(
                f"{registry.model} version {version} answers at {server.url}; Ctrl-C stops it\n{_example(server)}"
            )
            server.process.wait()
        console.print(f"the server ended with code {server.process.returncode}")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report(error)


def _example(server: Server) -> str:
    """Return a request that the model answers: a text, a pair where it was made for pairs, a message where it chats."""
    info = server.ask([], info=True)[1].get("predictions", [{}])[0]
    example: Any = ["A question?", "A passage."] if info.get("pairs") else "A sentence."
    if info.get("chats"):
        example = {"messages": [{"role": "user", "content": "Who are you?"}]}
    body = json.dumps({"inputs": [example]})
    return f"  curl -s {server.url}/invocations -H 'Content-Type: application/json' -d '{body}'"


if __name__ == "__main__":
    sys.exit(main())
