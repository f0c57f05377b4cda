"""A served model under load: concurrent clients, then malformed requests; errors, times, memory.

    python -m benchmarks.serving [--model NAME] [--version N | --alias NAME | --url URL]

Of a version of the registry a server of its own is started, and its memory measured; with --url, that of a server on
this machine whose process is named by --pid.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from ffn2moe.planning.timing import machine
from flows.serve import add_model_options, answers, ask, registry_of, report, served
from flows.workspace import FlowError

REQUESTS, CLIENTS, WARM_UP, MALFORMED = 1000, 8, 400, 200
TEXT = "a mixture of experts runs only some of its neurons for each token of the text that it is given to read"
WORDS = TEXT.split()
BAD: tuple[bytes, ...] = tuple(
    item if isinstance(item, bytes) else json.dumps(item).encode()
    for item in (
        b"",
        b"{",
        b'{"inputs": ["a"',
        b'{"inputs": ["\xff"]}',
        b'{"inputs": [NaN]}',
        b'{"inputs": ["\\ud800"]}',
        None,
        3,
        "text",
        ["text"],
        {},
        {"texts": ["a"]},
        {"inputs": None},
        {"inputs": "text"},
        {"inputs": {"text": "a"}},
        {"inputs": []},
        {"inputs": [""]},
        {"inputs": ["a", " "]},
        {"inputs": [None]},
        {"inputs": [1, 2]},
        {"inputs": [["a"]]},
        {"inputs": [{"text": "a"}]},
        {"dataframe_split": {"columns": ["text"], "data": [["a"]]}},
        {"dataframe_records": [{"text": "a"}]},
        {"inputs": ["a"], "params": {"info": "yes"}},
        {"inputs": ["a"], "params": "info"},
        {"inputs": ["word " * 200_000]},
        {"inputs": ["a"] * 10_000},
    )
)
console = Console(highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True)
class Load:
    """What clients saw: seconds of each request, statuses, seconds in all."""

    seconds: list[float]
    statuses: Counter[int]
    wall: float


def load(url: str, requests: int, clients: int) -> Load:
    """Requests of 1 to 8 texts of 3 to 60 words from clients that each keep a connection and wait for each answer."""
    host = url.partition("://")[2]
    numbers = iter(range(requests))  # shared: a client takes the next

    def client() -> list[tuple[float, int]]:
        connection = http.client.HTTPConnection(host, timeout=120)
        found = []
        for index in numbers:
            body = json.dumps({"inputs": texts(index)})
            start = time.perf_counter()
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            found.append((time.perf_counter() - start, response.status))
        connection.close()
        return found

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(client) for _ in range(clients)]
        rows = [row for future in futures for row in future.result()]
    wall = time.perf_counter() - start
    return Load([seconds for seconds, _ in rows], Counter(status for _, status in rows), wall)


def texts(index: int) -> list[str]:
    """Those of one request: the same for the same index."""
    words = itertools.islice(itertools.cycle(WORDS), index % len(WORDS), None)
    return [" ".join(itertools.islice(words, 3 + (7 * index + 13 * row) % 58)) for row in range(1 + index % 8)]


def memory(processes: Sequence[psutil.Process]) -> float:
    """Resident MiB of the server's processes together."""
    return sum(process.memory_info().rss for process in processes) / 2**20


def measure(url: str, processes: Sequence[psutil.Process], requests: int, clients: int, warm_up: int) -> dict[str, Any]:
    """Warm-up, the load, the malformed requests, and whether the same processes still answer."""
    alive = [process.pid for process in processes]
    load(url, warm_up, clients)
    before = memory(processes)
    found = load(url, requests, clients)
    after = memory(processes)
    refusals = Counter(ask(url, BAD[index % len(BAD)])[0] for index in range(MALFORMED))
    milliseconds = 1000 * np.array(found.seconds)
    return {
        "requests": requests,
        "clients": clients,
        "errors": requests - found.statuses[200],
        "p50_ms": float(np.percentile(milliseconds, 50)),
        "p99_ms": float(np.percentile(milliseconds, 99)),
        "requests_a_second": requests / found.wall,
        "texts_a_second": sum(len(texts(index)) for index in range(requests)) / found.wall,
        "memory_before_mib": before,
        "memory_after_mib": after,
        "memory_growth": after / before - 1 if processes else float("nan"),
        "malformed": dict(sorted(refusals.items())),
        "refused": sum(count for status, count in refusals.items() if 400 <= status < 500),
        "answers_after": answers(url),
        "same_processes": all(process.is_running() for process in processes) and alive == [p.pid for p in processes],
    }


@contextmanager
def server_of(options: argparse.Namespace) -> Iterator[tuple[str, list[psutil.Process]]]:
    """The address and the processes of what is measured."""
    if options.url:
        if not answers(options.url):
            raise FlowError(f"no served model answers at {options.url}; start one: make serve")
        parent = psutil.Process(options.pid) if options.pid else None
        yield options.url, [parent, *parent.children(recursive=True)] if parent else []
        return
    registry = registry_of(options)
    version = registry.resolve(options.version or options.alias)
    with TemporaryDirectory() as folder, served(registry, version, log=Path(folder) / "log") as server:
        yield server.url, server.processes()


def page(found: dict[str, Any], told: dict[str, Any], command: str) -> str:
    """The figures as a page."""
    what = (
        f"{told['model']} version {told['version']}, plan {told['plan']}" if told["model"] else f"plan {told['plan']}"
    )
    load_average = ", ".join(f"{value:.1f}" for value in psutil.getloadavg())
    hardware = machine()
    rows = [
        ("errors", f"{found['errors']} of {found['requests']}"),
        ("p50", f"{found['p50_ms']:.1f} ms"),
        ("p99", f"{found['p99_ms']:.1f} ms"),
        ("throughput", f"{found['requests_a_second']:.1f} requests/s, {found['texts_a_second']:.0f} texts/s"),
        (
            "memory of the server's processes",
            f"{found['memory_before_mib']:.0f} MiB after the warm-up, {found['memory_after_mib']:.0f} MiB at the end: "
            f"{100 * found['memory_growth']:+.2f} %",
        ),
        ("malformed requests", f"{found['refused']} of {MALFORMED} refused with 4xx: {found['malformed']}"),
        (
            "afterwards",
            f"/ping {'answers' if found['answers_after'] else 'does not answer'}, "
            f"{'no' if found['same_processes'] else 'a'} restart",
        ),
    ]
    return (
        "# A served model under load\n\n"
        f"{what}, head {told['head']}: `mlflow models serve`, one worker. {found['clients']} concurrent clients, each\n"
        "with a connection of its own that waits for each answer; requests of 1 to 8 texts of 3 to 60 words;\n"
        f"{WARM_UP} requests of warm-up before the memory is measured. Clients and server share the machine.\n"
        f"{hardware['cpu']}, {hardware['cores']} cores, Python {hardware['python']}; load average {load_average}:\n"
        "what is more than the clients and the server is other work, which had its share of the times.\n\n"
        f"```\n{command}\n```\n\n"
        "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--url", help="a model that is served already, for example http://127.0.0.1:5001")
    parser.add_argument("--pid", type=int, help="of --url: the process of `mlflow models serve`, for its memory")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--out", type=Path, help="write the page there")
    options = parser.parse_args(arguments)
    try:
        with server_of(options) as (url, processes):
            told = ask(url, {"inputs": [], "params": {"info": True}})[1]["predictions"][0]
            found = measure(url, processes, options.requests, options.clients, WARM_UP)
    except Exception as error:
        return report(error)
    table = Table(box=None, show_header=False)
    for key, value in found.items():
        table.add_row(key, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if options.out:
        command = "python -m benchmarks.serving " + " ".join(arguments if arguments is not None else sys.argv[1:])
        options.out.write_text(page(found, told, command), encoding="utf-8")
    return 0 if not found["errors"] and found["refused"] == MALFORMED and found["answers_after"] else 1


if __name__ == "__main__":
    sys.exit(main())
