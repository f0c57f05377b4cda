"""Check a run before its work: `python -m tasks.check`, which `make run` does first, and `prepare` once more.

It reads params.yaml in the current folder or, with the argument `-`, parameters as JSON from standard input.
What it finds decides whether a stage runs, never what a stage writes: DVC need not know it (tests/imports.py).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ffn2moe.preflight.request import Request
from ffn2moe.progress import Say
from tasks.corpus import FEWEST_TRAIN_TEXTS, INSTALLED, texts_to_write
from tasks.language_sets import about_tokens, of_folder
from tasks.params import Params, load_params, validate

if TYPE_CHECKING:
    from ffn2moe.preflight.case import Case

KEYS = {  # the settings of a `Request` -> their keys
    "source": "teacher.source",
    "revision": "teacher.revision",
    "head": "teacher.head",
    "max_length": "teacher.max_length",
    "corpus": "data.corpus",
    "text_column": "data.text_column",
    "texts": "data.max_texts",
    "keep_layers": "decompose.keep_layers",
    "ffn_width": "decompose.ffn_width",
    "num_experts": "decompose.num_experts",
    "num_active": "decompose.num_active",
    "expert_width": "decompose.expert_width",
    "shared_width": "decompose.shared_width",
    "width_per_layer": "decompose.width_per_layer",
    "partition": "decompose.partition",
    "container": "decompose.container",
    "gguf": "export.gguf",
    "gate": "decompose.gate",
    "active_per_layer": "decompose.active_per_layer",
    "elastic": "distill.elastic",
    "calibration_tokens": "decompose.calibration_tokens",
    "router_tokens": "train_router.tokens",
    "judged_texts": "data.evaluation_pairs",
    "decode_tokens": "benchmark.decode_tokens",
    "rounds": "benchmark.rounds",
    "timed": "benchmark.shapes",
    "steps": "distill.steps",
    "scope": "distill.scope",
    "batch_tokens": "distill.batch_tokens",
    "engines": "export.engines",
    "more_plans": "export.more_plans",
    "device": "compute.device",
}
STAGES = {  # stages -> the steps of the estimate that are their work
    "prepare": "texts",
    "decompose": "decomposing",
    "train_router": "routing",
    "distill": "distilling",
    "evaluate": "judging",
    "export": "graphs",
    "benchmark": "racing plans",
}
STARTING = 6.0  # seconds in which a stage imports its packages and reads its inputs
CHECKPOINTS = 5  # teacher, decomposed, routed, distilled, exported
STORED = 2  # in the workspace, and in the cache of DVC


def check(params: Params, root: Path, say: Say) -> Case:
    """Say what a run with these parameters makes and takes; ValueError or FileNotFoundError if it cannot be done."""
    from ffn2moe.preflight.case import Case
    from ffn2moe.preflight.checks import preflight

    require_files(params, root)
    case = Case(request_of(params, root))
    preflight(case, say)
    if params.data.folder is not None and case.dense.head == "causal":
        of_folder(root / params.data.folder)
    return case


def stage_seconds(case: Case) -> dict[str, float]:
    """Return the seconds that each stage may take."""
    from ffn2moe.preflight.duration import estimated

    steps = estimated(case)
    return {stage: round(STARTING + steps[step], 1) for stage, step in STAGES.items()}


def require_files(params: Params, root: Path) -> None:
    """FileNotFoundError where the labelled sets or the texts to evaluate on are not there."""
    data = params.data
    if data.evaluation is not None and not (root / Path(data.evaluation).expanduser()).is_file():
        raise FileNotFoundError(
            f"data.evaluation = {data.evaluation} is not a file; check the path, or give null for a part of the corpus"
        )
    if data.folder is not None and not (root / data.folder).is_dir():
        raise FileNotFoundError(f"data.folder = {data.folder} is not a folder; give one, or null for none")


def request_of(params: Params, root: Path) -> Request:
    """Return what the parameters ask for; paths are relative to the workspace."""
    from ffn2moe.dense.length import LONGEST_CAUSAL

    flat, data, settings = params.flat(), params.data, params.decompose
    shapes = params.benchmark.shapes
    length = LONGEST_CAUSAL if params.teacher.max_length == "auto" else params.teacher.max_length
    named = {name: flat[key] for name, key in KEYS.items()}
    other = {
        "source": teacher_source(params, root),
        "head": None if params.teacher.head == "auto" else params.teacher.head,
        "max_length": None if params.teacher.max_length == "auto" else params.teacher.max_length,
        "corpus": corpus_source(params, root),
        "active_per_layer": settings.active_per_layer if isinstance(settings.active_per_layer, tuple) else (),
        "texts": data.max_texts if data.corpus != "generated" else texts_to_write(data.max_texts, length),
        "batch_tokens": None if params.distill.batch_tokens == "auto" else params.distill.batch_tokens,
        "elastic": tuple(sorted({*params.distill.elastic} - {settings.num_active})),
        "timed": None if shapes == "auto" else tuple((int(shape[0]), int(shape[1])) for shape in shapes),
    }
    return Request(
        **named | other,
        called=KEYS,
        disk=root,
        fewest_texts=2 if data.folder or data.corpus == "generated" else FEWEST_TRAIN_TEXTS + 2,
        text_only=True,
        several_budgets=settings.active_per_layer != "same" or bool(params.distill.elastic),
        checkpoints=CHECKPOINTS,
        stored=STORED,
        question_tokens=0 if data.folder is None else about_tokens(root / data.folder, params.evaluate.most_questions),
    )


def teacher_source(params: Params, root: Path) -> str:
    """Return the teacher as `load_dense` takes it; a path is relative to the workspace."""
    path = root / Path(params.teacher.source).expanduser()
    return str(path) if path.exists() else params.teacher.source


def corpus_source(params: Params, root: Path) -> str:
    """Return the corpus as `read_corpus` takes it; a path is relative to the workspace."""
    source = params.data.corpus
    if source in (*INSTALLED, "generated") or source.startswith("datasets:"):
        return source
    return str(root / Path(source).expanduser())


def main() -> int:
    """Check the run of params.yaml, or those of standard input; return the exit code.

    Standard input has the parameters of one run, whose stages' seconds go to .cache/durations.json, or a list of [name,
    parameters]: then one line says what was checked.
    """
    from tasks.stage import USER_ERROR, explain, prepare_process

    root, name = Path.cwd(), ""
    try:
        given = json.load(sys.stdin) if sys.argv[1:] == ["-"] else None
        if isinstance(given, list):
            for name, parameters in given:  # noqa: B007
                params = validate(parameters)
                prepare_process(params)
                check(params, root, lambda line: None)
            print(f"checked: {', '.join(name for name, _ in given)}")  # noqa: T201
            return 0
        params = validate(given) if given is not None else load_params(root / "params.yaml")
        prepare_process(params)
        case = check(params, root, print)
        durations = root / ".cache" / "durations.json"
        durations.parent.mkdir(exist_ok=True)
        durations.write_text(json.dumps(stage_seconds(case), indent=2) + "\n", encoding="utf-8")
        return 0
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("FFN2MOE_DEBUG"):
            raise
        print(f"error: {f'{name}: ' if name else ''}{message}", file=sys.stderr)  # noqa: T201
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
