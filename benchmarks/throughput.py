"""Time the encoding of real texts, tokenisation included: our plans, sentence-transformers and fastembed in turn.

    python -m benchmarks.throughput models/exported DATA --out docs/results/throughput.md

DATA is a folder with `ag_news/sample.csv` and `sst2/train.tsv`; the third set is the docstrings of Python's standard
library. An export that was planned is also opened without a plan: `default`. Every encoder runs in a process of its
own, all with the same number of threads. Each round has texts that the rounds before did not have, and every encoder
runs in it. What is not installed is left out, with the reason. The extras of sentence-transformers need packages that
may not fit beside others: --python names another environment's Python, and it runs what this one lacks. The graphs of
the others and the finished rounds are kept in --cache, so a stopped run resumes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.page import Page, chosen, parser_of, report, rounds_of
from benchmarks.race import FEWEST_ROUNDS
from benchmarks.throughput_encoders import ENCODERS
from benchmarks.throughput_page import COMPARED, DEFAULT, IN_ORDER, REFERENCE, page
from ffn2moe.data import corpus
from ffn2moe.dense.plain import plain_folder
from ffn2moe.planning import timing
from ffn2moe.runtime.files import read_manifest, read_plan
from ffn2moe.sentence import SentenceModules

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("ONEDNN_MAX_CPU_ISA", "FFN2MOE_NATIVE")  # they take instructions from OpenVINO and from our operator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.throughput", __doc__)
    parser.add_argument("export", type=Path, help="the export of a sentence encoder, for example models/exported")
    parser.add_argument("data", type=Path, help="the folder with ag_news/sample.csv and sst2/train.tsv")
    parser.add_argument("--model", help="the dense model, for the other encoders (the export's teacher)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=256, help="texts of a round (256)")
    parser.add_argument("--at-once", type=int, help="texts of a call: as in requests to a server (all of a round)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plans", nargs="+", help="only these plans of the export (all but fused)")
    parser.add_argument("--text-order", nargs="+", default=[], help="plans to run in the order of the texts, too")
    parser.add_argument("--python", nargs="+", default=[], help="Python of other environments, to look for the others")
    parser.add_argument("--cache", type=Path, default=Path(".cache/throughput"), help="(.cache/throughput)")
    return report(parser, measure, arguments)


def measure(options: argparse.Namespace, console: Console) -> Page:
    """Return the page."""
    if options.rounds < FEWEST_ROUNDS or min(options.threads, options.texts, options.at_once or 1) < 1:
        raise ValueError(f"ask for {FEWEST_ROUNDS} rounds or more, and at least one thread, text and text of a call")
    manifest = read_manifest(options.export)
    if manifest["spec"]["head"] != "embedding":
        raise ValueError(f"{options.export} makes no embeddings: name the export of a sentence encoder")
    sets = {name: texts for name, texts in read_sets(options.data)}
    plans = [plan for plan in chosen(manifest["plans"], options.plans, always="") if plan != "fused"]
    chosen(plans, options.text_order)
    options.cache.mkdir(parents=True, exist_ok=True)
    settings = {
        "export": str(options.export.resolve()),
        "model": str(Path(plain_folder(options.model or manifest["spec"]["teacher"])).resolve()),
        "width": SentenceModules.of_spec(manifest["spec"]).embedding_width(manifest["spec"]["stacks"][0]["width"]),
        "threads": options.threads,
        "cache": str(options.cache.resolve()),
        "calibration": [text for texts in sets.values() for text in texts[-100:]],
    }
    with ExitStack() as stack, rounds_of(console) as track:
        workers, left_out = _started(stack, settings, plans, options, console)
        cosines = _compared(workers, next(iter(sets.values())))
        for name, texts in sets.items():  # compiles, allocates, and chooses a batch size
            console.print(f"warming up on {name}")
            for worker in workers.values():
                worker.ask(texts[-max(1, options.texts // 4) :], name)
        file = options.cache / f"{_digest(options, manifest, list(workers))}.jsonl"
        kept = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        rows = {(row["set"], row["round"]): row for row in kept}
        if len(rows) >= len(sets) * options.rounds:
            console.print(f"these figures are from {file}; delete it to measure again")
        for index in track("encoding", range(options.rounds)):
            for name, texts in sets.items():
                if (name, index) not in rows:
                    row = _round(workers, name, texts, index, options)
                    rows[name, index] = row
                    with file.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(row) + "\n")
    return page(list(rows.values()), cosines, left_out, options, manifest["spec"])


def read_sets(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the texts of each set, shuffled. FileNotFoundError, with the remedy, if a file is missing."""
    files = {"AG News": folder / "ag_news" / "sample.csv", "SST-2": folder / "sst2" / "train.tsv"}
    for file in files.values():
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: name the folder that has it")
    with files["AG News"].open(encoding="utf-8", newline="") as stream:
        news = [f"{title} {body}" for _, title, body in csv.reader(stream)]
    reviews = [line.rsplit("\t", 1)[0] for line in files["SST-2"].read_text(encoding="utf-8").splitlines()]
    sets = {"AG News": news, "docstrings": corpus.docstrings((), workers=1), "SST-2": reviews}
    for name, texts in sets.items():
        usable = sorted({text for text in texts if text.strip()})
        yield name, random.Random(0).sample(usable, len(usable))


@dataclass(frozen=True)
class Worker:
    """Hold the process of an encoder."""

    process: subprocess.Popen[str]

    def ask(self, texts: Sequence[str], name: str, *, at_once: int | None = None, vectors: bool = False) -> Any:
        """Return the answer for texts of a set; RuntimeError if the process ended."""
        assert self.process.stdin is not None
        asked = {"texts": texts, "set": name, "at_once": at_once or len(texts), "vectors": vectors}
        with suppress(BrokenPipeError):  # the missing answer says it
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """Return the next answer; RuntimeError if the process ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"an encoder ended (exit code {self.process.wait()}): {self.process.args}")
        return json.loads(line)

    def end(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _started(
    stack: ExitStack, settings: dict[str, Any], plans: Sequence[str], options: argparse.Namespace, console: Console
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the encoders; return those that run, and the reasons of the others."""
    ours: dict[str, tuple[str, str | None]] = {plan: ("plan", plan) for plan in plans}
    if read_plan(Path(settings["export"])) is not None:
        ours[DEFAULT] = ("plan", None)
    ours |= {f"{plan}{IN_ORDER}": ("plan in order", plan) for plan in options.text_order}
    kinds = ours | {name: (name, None) for name in ENCODERS}
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    for name, (kind, plan) in kinds.items():
        console.print(f"opening {name}")
        file = options.cache / "settings.json"
        file.write_text(json.dumps(settings | {"plan": plan}), encoding="utf-8")
        for python in [sys.executable, *(options.python if name in ENCODERS else [])]:
            worker = Worker(_process(python, kind, file, options.threads))
            stack.callback(worker.end)
            reason = worker.answer().get("left_out")
            if reason is None:
                workers[name] = worker
                left_out.pop(name, None)
                break
            left_out[name] = reason
    return workers, left_out


def _process(python: str, kind: str, file: Path, threads: int) -> subprocess.Popen[str]:
    """Start an encoder whose libraries use this many threads and no network."""
    counts = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    own = dict.fromkeys(counts, str(threads)) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    own["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
    return subprocess.Popen(
        [python, "-m", "benchmarks.throughput_encoders", kind, str(file.resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | own,
        cwd=ROOT,  # where the module is
    )


def _compared(workers: Mapping[str, Worker], texts: Sequence[str]) -> dict[str, float]:
    """Return the mean cosine of each encoder's vectors with those of the reference, or of the first without one."""
    found = {name: _unit(worker.ask(texts[:COMPARED], "", vectors=True)["vectors"]) for name, worker in workers.items()}
    expected = found.get(REFERENCE, next(iter(found.values())))
    return {name: float((vectors * expected).sum(1).mean()) for name, vectors in found.items()}


def _unit(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    vectors_ND = np.array(vectors)
    lengths_N1: np.ndarray = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / lengths_N1


def _digest(options: argparse.Namespace, manifest: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return a short name of all that the figures depend on."""
    switches = [os.environ.get(name) for name in SWITCHES]
    chosen_here = {key: (read_plan(options.export) or {}).get(key) for key in ("choices", "lists")}
    asked = [options.threads, options.texts, options.at_once, names]
    own = [manifest["plans"], chosen_here, *asked, timing.machine(), switches]
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


def _round(
    workers: Mapping[str, Worker], name: str, texts: Sequence[str], index: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of every encoder on the texts of a round of a set, in an order of the round."""
    count = min(options.texts, len(texts))
    part = [texts[(index * count + place) % len(texts)] for place in range(count)]
    found = {
        encoder: workers[encoder].ask(part, name, at_once=options.at_once)
        for encoder in random.Random(index).sample(list(workers), len(workers))
    }
    seconds = {encoder: found[encoder]["seconds"] for encoder in workers}
    batches = {encoder: found[encoder]["batch"] for encoder in workers}
    return {
        "set": name,
        "round": index,
        "texts": count,
        "seconds": seconds,
        "batch": batches,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
