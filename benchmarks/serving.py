"""Load a served model with concurrent clients, then with malformed requests; measure errors, times and memory.

    python -m benchmarks.serving [--model NAME] [--version N | --alias NAME | --url URL]

It starts a server for a version of the registry and measures its memory. With --url it asks a running server; --pid
names its process on this machine.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil

from benchmarks.page import Grid, Page, about, command_of, console_of, load_average, parser_of, working
from flows.errors import report
from flows.serve import add_model_options, answers, ask, registry_of, served
from flows.workspace import FlowError

REQUESTS, CLIENTS, WARM_UP, MALFORMED = 1000, 8, 400, 200
TEXT = "a mixture of experts runs only some of its neurons for each token of the text that it is given to read"
WORDS = TEXT.split()
BAD: list[Any] = [b"", b"{", b'{"inputs": ["a"', b'{"inputs": ["\xff"]}', b'{"inputs": [NaN]}']
BAD += [b'{"inputs": ["\\ud800"]}']
BAD += [None, 3, "text", ["text"], {}, {"texts": ["a"]}, {"dataframe_split": {"columns": ["text"], "data": [["a"]]}}]
BAD += [{"dataframe_records": [{"text": "a"}]}, {"inputs": ["a"], "params": {"info": "yes"}}]
BAD += [{"inputs": ["a"], "params": "info"}]
BAD += [{"inputs": bad} for bad in (None, "text", {"text": "a"}, [], [""], ["a", " "], [None], [1, 2], [["a"]])]
BAD += [{"inputs": bad} for bad in ([{"text": "a"}], ["word " * 200_000], ["a"] * 10_000)]


def load(url: str, requests: int, clients: int) -> tuple[list[float], Counter[int], float]:
    """Send requests of 1 to 8 texts of 3 to 60 words; each client keeps a connection and waits for each answer.

    Return the seconds of each request, the statuses, and the seconds in all.
    """
    host = url.partition("://")[2]
    numbers = iter(range(requests))  # shared: each client takes the next number

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
    return [seconds for seconds, _ in rows], Counter(status for _, status in rows), wall


def texts(index: int) -> list[str]:
    """Return the texts of a request: the same for the same index."""
    words = itertools.islice(itertools.cycle(WORDS), index % len(WORDS), None)
    return [" ".join(itertools.islice(words, 3 + (7 * index + 13 * row) % 58)) for row in range(1 + index % 8)]


def measure(url: str, processes: Sequence[psutil.Process], requests: int, clients: int, warm_up: int) -> dict[str, Any]:
    """Run the warm-up, the load and the malformed requests; check that the same processes still answer."""
    alive = [process.pid for process in processes]

    def memory() -> float:
        return sum(process.memory_info().rss for process in processes) / 2**20

    load(url, warm_up, clients)
    before = memory()
    seconds, statuses, wall = load(url, requests, clients)
    after = memory()
    refusals = Counter(ask(url, BAD[index % len(BAD)])[0] for index in range(MALFORMED))
    p50, p99 = np.percentile(seconds, (50, 99))
    return {
        "requests": requests,
        "clients": clients,
        "errors": requests - statuses[200],
        "p50_ms": 1000 * float(p50),
        "p99_ms": 1000 * float(p99),
        "requests_a_second": requests / wall,
        "texts_a_second": sum(len(texts(index)) for index in range(requests)) / wall,
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
    """Give the address and the processes of the served model."""
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


def page_of(found: dict[str, Any], clients: int, info: dict[str, Any]) -> Page:
    """Return the page."""
    memory_text = (
        f"{found['memory_before_mib']:.0f} MiB after the warm-up, {found['memory_after_mib']:.0f} MiB at the end"
    )
    alive = f"/ping {'answers' if found['answers_after'] else 'does not answer'}"
    rows = [
        ["errors", f"{found['errors']} of {found['requests']}"],
        ["p50", f"{found['p50_ms']:.1f} ms"],
        ["p99", f"{found['p99_ms']:.1f} ms"],
        ["throughput", f"{found['requests_a_second']:.1f} requests/s, {found['texts_a_second']:.0f} texts/s"],
        ["memory of the server's processes", f"{memory_text}: {100 * found['memory_growth']:+.2f} %"],
        ["malformed requests", f"{found['refused']} of {MALFORMED} refused with 4xx: {found['malformed']}"],
        ["afterwards", f"{alive}, {'no' if found['same_processes'] else 'a'} restart"],
    ]
    name = f"{info['model']} version {info['version']}, " if info["model"] else ""
    return Page(
        "A served model under load",
        [
            f"{name}plan {info['plan']}, head {info['head']}: `mlflow models serve`, one worker. {clients} concurrent "
            "clients, each with its own connection, send requests of 1 to 8 texts of 3 to 60 words and wait for each "
            f"answer. {WARM_UP} requests of warm-up come before the memory is measured. Clients and server share the "
            f"machine. {about()}. {load_average()}",
        ],
        [Grid("A served model under load", ["figure", "value"], rows)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 for errors or a malformed request that was not refused."""
    parser = parser_of("benchmarks.serving", __doc__)
    add_model_options(parser)
    parser.add_argument("--url", help="a running served model, for example http://127.0.0.1:5001")
    parser.add_argument("--pid", type=int, help="process of `mlflow models serve` at --url, to measure its memory")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    options = parser.parse_args(arguments)
    console = console_of()
    try:
        with server_of(options) as (url, processes), working(console, "asking the server"):
            info = ask(url, {"inputs": [], "params": {"info": True}})[1]["predictions"][0]
            found = measure(url, processes, options.requests, options.clients, WARM_UP)
    except Exception as error:
        return report(error)
    page = page_of(found, options.clients, info)
    console.print(page.grids[0].table())
    if options.out:
        console.print(f"written: {', '.join(page.write(options.out, command_of(parser, options)))}")
    return 0 if not found["errors"] and found["refused"] == MALFORMED and found["answers_after"] else 1


if __name__ == "__main__":
    sys.exit(main())
