"""Time the files of one language model where people run them: llama.cpp, OpenVINO and ONNX Runtime, side by side.

    python -m benchmarks.generation candidates --text held-out.txt --out docs/results/generation.md

The folder has GGUF files and exports (`ffn2moe convert --every-plan`): the dense model, students without experts and
mixtures, all with one tokenizer. Every GGUF file is run in llama.cpp, and every plan of an export with weights of 8
bits or fewer in its engine. The quality of a file is the perplexity of its own quantised weights, in its own engine, on
the text. Speeds are tokens a second of reading a prompt and of greedy decoding after it. All files run in every round,
in an order of its own; a speed over another file is the median of the ratios within rounds.

What is measured stays in CANDIDATES/measured.json, so that a stopped run resumes. Without llama-cpp-python the GGUF
files are left out, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
from rich.console import Console

from benchmarks import llama_cpp_files
from benchmarks.generation_page import ENGINE_NAMES, LLAMA, Row, page
from benchmarks.llama_cpp_files import LlamaFile
from benchmarks.page import load_average, parser_of, report, rounds_of, some, working
from benchmarks.race import Sample, Samples, Spread, Track, race
from ffn2moe.planning import timing
from ffn2moe.runtime.decoders import CausalExport
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import MANIFEST, read_manifest
from ffn2moe.runtime.plans import plan_of
from ffn2moe.spec import MoESpec

Role = Literal["dense", "pruned", "mixture"]
MEASURED = "measured.json"
BLOCK = 512  # tokens that are judged together, each after those before it
TEXTS = 8  # of a length; they take turns, as the text decides the experts
WAKING = 16  # tokens read before the clock starts: another file's weights are in the cache


@dataclass(frozen=True)
class Candidate:
    """A file, and the plan that runs it where it is an export."""

    name: str
    engine: str
    role: Role
    bits: int  # of a weight of the FFNs
    active: float  # share of the dense model's FFN that a token uses
    path: Path
    plan: str | None
    fingerprint: str  # changes with the content

    @contextmanager
    def opened(self, threads: int, positions: int) -> Iterator[Opened]:
        """Open the file on a number of threads, for texts of at most so many tokens."""
        if self.plan is not None:
            export = open_export(self.path, self.plan, threads)
            yield Opened(partial(_greedy, export), export.logits)
            return
        file = LlamaFile(self.path, threads=threads, positions=positions)
        try:
            yield Opened(lambda ids, tokens: file.greedy(ids), file.logits)
        finally:
            file.close()


@dataclass(frozen=True)
class Opened:
    """An open file."""

    greedy: Callable[[Sequence[int], int], Iterator[int]]  # a prompt and a number of tokens -> at least those tokens
    logits: Callable[[Sequence[int]], np.ndarray]  # [L] -> [L, V]


def _greedy(export: CausalExport, ids: Sequence[int], tokens: int) -> Iterator[int]:
    for [token] in export.generate_tokens([ids], max_new_tokens=tokens, stop_at_end=False):
        yield int(token)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = parser_of("benchmarks.generation", __doc__)
    parser.add_argument("candidates", type=Path, help="a folder of GGUF files and exports")
    parser.add_argument("--text", type=Path, required=True, help="a text that no file was made with")
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 128, 512], help="tokens of a prompt")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32, help="decoded after a prompt")
    parser.add_argument("--judged", type=int, default=4096, help="tokens of the text that the perplexity is of")
    return report(parser, lambda options, console: page(measure(options, console)), arguments)


# --- what there is --------------------------------------------------------------------------------------------------


def candidates_of(folder: Path, skipped: dict[str, str]) -> list[Candidate]:
    """Return the files of a folder; note in `skipped` why one is left out. ValueError where there is no dense file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: name a folder of GGUF files and exports")
    found = [one for export in sorted(folder.glob(f"*/{MANIFEST}")) for one in _plans_of(export.parent)]
    if not found:
        raise ValueError(
            f"{folder} has no export: make one there with `ffn2moe convert MODEL {folder}/NAME --every-plan`"
        )
    if llama_cpp_files.is_installed():
        found += _llama_files(folder)
    else:
        missing = f"llama.cpp is not installed: {llama_cpp_files.REMEDY}"
        skipped |= {file.name: missing for file in sorted(folder.glob("*.gguf"))}
    unique = {one.fingerprint: one for one in reversed(found)}  # exports of one teacher share their dense plans
    kept = sorted(unique.values(), key=lambda one: (one.engine, one.role, -one.active, -one.bits, one.name))
    if not any(one.role == "dense" for one in kept):
        raise ValueError(f"{folder} has no dense file, so there is nothing to compare with: add the dense model's")
    return kept


def _plans_of(export: Path) -> Iterator[Candidate]:
    manifest = read_manifest(export)
    spec = MoESpec.from_dict(manifest["spec"])
    if spec.head != "causal":
        raise ValueError(f"{export} is no language model: its head is {spec.head}; remove it")
    for name, entry in manifest["plans"].items():
        plan = plan_of(name)
        if not plan.is_quantised:
            continue
        role: Role = "dense" if plan.dense else "pruned" if plan.without_experts else "mixture"
        shown = name if plan.dense else f"{export.name} {name}"
        active = 1.0 if plan.dense else spec.active_share
        print_of = f"{entry['sha256']} {plan.engine}"
        yield Candidate(shown, ENGINE_NAMES[plan.engine], role, plan.bits, active, export, name, print_of)


def _llama_files(folder: Path) -> Iterator[Candidate]:
    read = {path: llama_cpp_files.contents_of(path) for path in sorted(folder.glob("*.gguf"))}
    whole = max((one.ffn_read for one in read.values() if not one.mixture), default=math.nan)
    for path, one in read.items():
        role: Role = "mixture" if one.mixture else "dense" if one.ffn_read == whole else "pruned"
        state = path.stat()
        print_of = f"{state.st_size} {state.st_mtime_ns}"
        yield Candidate(path.stem, LLAMA, role, int(one.ffn_bits), one.ffn_read / whole, path, None, print_of)


# --- measuring ------------------------------------------------------------------------------------------------------


class Measured:
    """The figures of a folder, kept in a file: {"quality": {...}, "speed": {...}}."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known = json.loads(file.read_text()) if file.is_file() else {"quality": {}, "speed": {}}

    def get(self, kind: str, key: str) -> Any:
        return self._known[kind].get(key)

    def put(self, kind: str, key: str, value: Any) -> None:
        self._known[kind][key] = value
        partial_file = self._file.with_suffix(".partial")
        partial_file.write_text(json.dumps(self._known))
        os.replace(partial_file, self._file)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return all figures of the page, ready for JSON."""
    if min(*options.prompts, *options.threads, options.tokens) < 1:
        raise ValueError("--prompts, --threads and --tokens start at 1")
    skipped: dict[str, str] = {}
    found = candidates_of(options.candidates, skipped)
    measured = Measured(options.candidates / MEASURED)
    with working(console, "reading the text"):
        ids = _tokens(found, options)
    quality = _quality(found, ids, options, measured, skipped, console)
    rows: list[Row] = []
    with rounds_of(console) as track:
        for threads in options.threads:
            for prompt, phases in _speeds(found, ids, threads, options, measured, track, skipped).items():
                rows += _rows([one for one in found if one.name not in skipped], phases, threads, prompt)
    return {
        "machine": timing.machine(),
        "llama_cpp": llama_cpp_files.version() if llama_cpp_files.is_installed() else None,
        "text": options.text.name,
        "judged": len(ids[: options.judged]),
        "block": BLOCK,
        "tokens": options.tokens,
        "load": load_average(),
        "skipped": skipped,
        "files": [
            {name: value for name, value in asdict(one).items() if name not in ("path", "plan", "fingerprint")}
            | {"perplexity": quality[one.name]}
            for one in found
            if one.name not in skipped
        ],
        "rows": [asdict(row) for row in rows],
    }


def _tokens(found: Sequence[Candidate], options: argparse.Namespace) -> list[int]:
    """Return the token ids of the text. ValueError where it is too short, or the model cannot hold the prompts."""
    if not options.text.is_file():
        raise FileNotFoundError(f"{options.text} does not exist: name a text with --text")
    first = next(one for one in found if one.plan is not None)
    export = open_export(first.path, first.plan, 1)
    ids: list[int] = export.token_ids(options.text.read_text(encoding="utf-8"))
    needed = max(max(options.prompts) + TEXTS, options.judged)
    if len(ids) < needed:
        raise ValueError(f"{options.text} has {len(ids)} tokens, and {needed} are needed: give a longer text")
    longest = max(options.prompts) + options.tokens
    if export.longest is not None and longest > export.longest:
        raise ValueError(f"the model holds {export.longest} tokens, and {longest} are asked for: shorten --prompts")
    return ids


def _quality(
    found: Sequence[Candidate],
    ids: Sequence[int],
    options: argparse.Namespace,
    measured: Measured,
    skipped: dict[str, str],
    console: Console,
) -> dict[str, float]:
    """Return the perplexity of each file, and note in `skipped` why one does not open."""
    judged = ids[: options.judged]
    quality = {}
    for one in found:
        key = f"{one.fingerprint} {options.text.name} {len(judged)}"
        if measured.get("quality", key) is None:
            with working(console, f"judging {one.name}"):
                try:
                    with one.opened(max(options.threads), BLOCK) as file:
                        measured.put("quality", key, _perplexity(file, judged))
                except ValueError as reason:
                    skipped[one.name] = str(reason)
                    continue
        quality[one.name] = measured.get("quality", key)
    return quality


def _perplexity(file: Opened, ids: Sequence[int]) -> float:
    """Return exp of the mean nats a token, over blocks; the first token of each is given."""
    nats: list[np.ndarray] = []
    for start in range(0, len(ids) - 1, BLOCK):
        block = list(ids[start : start + BLOCK])
        z_LV = file.logits(block)[:-1]
        most_L1 = z_LV.max(-1, keepdims=True)
        sums_L = np.log(np.exp(z_LV - most_L1).sum(-1, dtype=np.float64)) + most_L1[:, 0]
        nats.append(sums_L - np.take_along_axis(z_LV, np.array(block[1:])[:, None], axis=1)[:, 0])
    return float(np.exp(np.concatenate(nats).mean()))


def _speeds(
    found: Sequence[Candidate],
    ids: Sequence[int],
    threads: int,
    options: argparse.Namespace,
    measured: Measured,
    track: Track,
    skipped: Mapping[str, str],
) -> dict[int, dict[str, Samples]]:
    """Return the seconds of every file by prompt and phase; only what is not known yet is timed."""
    files = {one.name: one for one in found if one.name not in skipped}
    settings = {"rounds": options.rounds, "tokens": options.tokens}
    key_of = {
        prompt: json.dumps([threads, prompt, settings, {name: one.fingerprint for name, one in files.items()}])
        for prompt in options.prompts
    }
    missing = [prompt for prompt in options.prompts if measured.get("speed", key_of[prompt]) is None]
    if missing:
        with _all_opened(files, threads, max(options.prompts) + options.tokens + 1) as opened:
            for prompt in missing:
                texts = [ids[place * (len(ids) - prompt) // TEXTS :][:prompt] for place in range(TEXTS)]
                timed = {name: _sample(file, texts, options.tokens) for name, file in opened.items()}
                label = f"prompts of {prompt} tokens, {some(threads, 'thread')}"
                raced = race(timed, rounds=options.rounds, warm_up=1, label=label, track=track)
                seconds = {
                    phase: {name: list(values) for name, values in one.seconds.items()} for phase, one in raced.items()
                }
                measured.put("speed", key_of[prompt], seconds)
    return {
        prompt: {phase: Samples(values) for phase, values in measured.get("speed", key_of[prompt]).items()}
        for prompt in options.prompts
    }


@contextmanager
def _all_opened(files: Mapping[str, Candidate], threads: int, positions: int) -> Iterator[dict[str, Opened]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(one.opened(threads, positions)) for name, one in files.items()}


def _sample(file: Opened, texts: Sequence[Sequence[int]], tokens: int) -> Sample:
    """Return a sample: seconds to read a prompt and give a first token, and seconds of each token after it."""

    def sample(index: int) -> dict[str, float]:
        ids = list(texts[index % len(texts)])
        next(file.greedy(ids[:WAKING], 1))
        start = time.perf_counter()
        steps = file.greedy(ids, tokens + 1)
        next(steps)
        first = time.perf_counter()
        for _ in range(tokens):
            next(steps)
        return {"prefill": first - start, "decode": (time.perf_counter() - first) / tokens}

    return sample


def _rows(found: Sequence[Candidate], phases: Mapping[str, Samples], threads: int, prompt: int) -> Iterator[Row]:
    dense = [one for one in found if one.role == "dense"]
    for phase, samples in phases.items():
        fastest = samples.fastest(one.name for one in dense)
        for one in found:
            like = [other.name for other in dense if other.bits == one.bits]
            same = samples.fastest(like) if like else fastest
            read = prompt if phase == "prefill" else 1
            rates = [read / seconds for seconds in samples.seconds[one.name]]
            over = [_figures(samples.speed(one.name, other)) for other in (same, fastest)]
            yield Row(
                one.name,
                threads,
                prompt,
                phase,
                round(median(rates), 2),
                same,
                over[0],
                fastest,
                over[1],
                samples.rounds,
            )


def _figures(spread: Spread) -> tuple[float, float, float]:
    return round(spread.median, 4), round(spread.low, 4), round(spread.high, 4)


if __name__ == "__main__":
    sys.exit(main())
