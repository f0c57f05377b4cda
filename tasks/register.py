"""Stage 9: register the export as a version of a model, with the alias `challenger`.

`challenger` points to the newest version that answers; flows/promote.py decides whether it becomes `champion`. If a
later step fails, the alias moves back and the version is deleted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ffn2moe.planning.shipping import link_graphs
from ffn2moe.runtime.engines import distribution
from ffn2moe.runtime.export import open_export
from tasks.lock import locked_deps, locked_outs
from tasks.measures import at, headline, numbers, reads_pairs
from tasks.params import Params
from tasks.registry import CHALLENGER, Registry
from tasks.stage import StageRun, main

EXAMPLE = ("A mixture of experts runs a part of itself for each token.", "The weather is fine today.")
PAIRS = (("What does a mixture of experts run?", EXAMPLE[0]), ("What does a mixture of experts run?", EXAMPLE[1]))
# Packages that the served model imports, besides its engines and the package ffn2moe, which is stored with it.
REQUIREMENTS = ("jinja2", "numpy", "onnx", "pyyaml", "tokenizers")
SAME = 1e-5  # largest difference of components of unit vectors: the same graph, computed twice


def run(stage: StageRun) -> None:
    """Register exports/NAME and write metrics/register.json; ValueError if the version answers wrongly."""
    root, params = stage.root, stage.params
    export = root / "exports" / params.name
    plan = _json(export / "plan.json")
    quality = _json(root / "metrics" / "evaluate.json")

    registry = Registry(root, params.model_name)
    scratch = root / ".cache"
    scratch.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder, ExitStack() as undo:
        served = slim_copy(export, Path(folder) / "export", plan)
        facts = measured(quality, plan, served)
        version = undo.enter_context(
            registry.added(
                code=root / "tasks" / "served_model.py",
                export=served,
                packages=[root / "ffn2moe"],
                requirements=requirements(_json(served / "manifest.json")),
                example=[list(one) if isinstance(one, tuple) else one for one in example_of(export)],
                settings={
                    "max_texts": params.register_.max_texts,
                    "max_characters": params.register_.max_characters,
                },
                options={"info": False, "prompt_name": ""},
            )
        )
        registry.tag(version, tags(root, params, quality, facts, plan))
        check_answers(registry, version, export)
        undo.enter_context(registry.moved(CHALLENGER, version))
        stage.write_json(
            "metrics/register.json",
            {"model": registry.model, "version": version, "aliases": [CHALLENGER], **facts},
        )
    stage.say(f"{registry.model} version {version}, alias {CHALLENGER}")


def measured(quality: Mapping[str, Any], plan: Mapping[str, Any], served: Path) -> dict[str, float]:
    """Return the figures that judge a version: share of the teacher's quality, speed-up, bytes that are served.

    The speed-up is that of the whole workload over the best dense plans, the lowest over the numbers of threads.
    """
    return {
        "retention": float(at(quality["retention"], headline(quality).path)),
        "speedup_vs_best_dense": min(float(row["speedup_vs_best_dense"]) for row in plan["by_threads"]),
        "bytes": sum(file.stat().st_size for file in served.rglob("*") if file.is_file()),
    }


def requirements(manifest: Mapping[str, Any]) -> list[str]:
    """Return what a model with these plans needs, at the versions of this environment."""
    engines = {"onnxruntime"} | {entry["engine"] for entry in manifest["plans"].values() if "engine" in entry}
    names = [*REQUIREMENTS, *(distribution(engine) or engine for engine in sorted(engines))]
    return [f"{name}=={metadata.version(name)}" for name in sorted(names)]


def slim_copy(export: Path, target: Path, plan: Mapping[str, Any]) -> Path:
    """Copy what serving needs of an export to `target`: the chosen plans, without the checkpoint; return `target`."""
    manifest = _json(export / "manifest.json")
    manifest.pop("left_out", None)
    manifest["plans"] = {name: manifest["plans"][name] for name in plan["plans"]}
    link_graphs(export, target, manifest["plans"].values())
    shutil.copytree(export / "tokenizer", target / "tokenizer")
    slim = {**plan, "timings": {name: plan["timings"][name] for name in plan["plans"]}}
    for name, payload in (("manifest.json", manifest), ("plan.json", slim)):
        (target / name).write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def check_answers(registry: Registry, version: int, export: Path) -> None:
    """Ask the registered version itself; ValueError unless it answers as the export does."""
    example = example_of(export)
    if not same(registry.predict(version, example), answers(export, example)):
        raise ValueError(
            f"version {version} of {registry.model} does not answer as {export} does; "
            "it is removed again and the aliases are unchanged; to retry: dvc repro -s register"
        )


def example_of(export: Path) -> tuple[Any, ...]:
    """Return the inputs that a served model is asked with: texts, or pairs where the export was made for them."""
    return PAIRS if reads_pairs(_json(export / "manifest.json")) else EXAMPLE


def answers(export: Path, inputs: Sequence[Any]) -> list[Any]:
    """Return the answers that a served model must give, computed with the export itself."""
    opened = open_export(export)
    if hasattr(opened, "generate"):
        return ["".join(opened.generate(text)) for text in inputs]
    found: list[Any] = opened.encode(inputs).tolist() if hasattr(opened, "encode") else opened.answers(inputs)
    return found


def same(given: Any, expected: Any) -> bool:
    """Return whether answers agree: the same form and texts, numbers within rounding."""
    if isinstance(expected, float):
        return isinstance(given, float | int) and math.isclose(given, expected, rel_tol=SAME, abs_tol=SAME)
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(same(given[key], value) for key, value in expected.items())
        )
    if isinstance(expected, list):
        return isinstance(given, list) and len(given) == len(expected) and all(map(same, given, expected))
    return bool(given == expected)


def tags(
    root: Path,
    params: Params,
    quality: Mapping[str, Any],
    facts: Mapping[str, float],
    plan: Mapping[str, Any],
) -> dict[str, str]:
    """Return the tags of a version: its git commit, the DVC hashes of its export, its figures."""
    commit = os.environ.get("FFN2MOE_GIT_COMMIT") or _git(root, "rev-parse", "HEAD")
    dirty = os.environ.get("FFN2MOE_GIT_DIRTY") or str(
        bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"))
    )
    found = {
        "git.commit": commit,
        "git.dirty": dirty.lower(),
        "head": quality.get("head", "embedding"),
        **({"problem": quality["problem"]} if "problem" in quality else {}),
        "default_plan": str(plan["default_plan"]),
        **({"list_plan": str(plan["lists"][0]["plan"])} if plan.get("lists") else {}),
        "speedup_vs_best_dense": f"{facts['speedup_vs_best_dense']:.4f}",
        "bytes": f"{facts['bytes']:.0f}",
    }
    found |= {f"retention.{key}": f"{value:.6f}" for key, value in numbers(quality["retention"])}
    found |= {f"student.{key}": f"{value:.6f}" for key, value in numbers(quality["student"])}
    found |= {f"dvc.md5.{Path(path).name}": md5 for path, md5 in locked_outs(root, "export").items()}
    judged_by = [md5 for path, md5 in locked_deps(root, "evaluate").items() if _judges(path)]
    if judged_by:
        found["evaluated_on"] = " ".join(sorted(judged_by))
    return found


def _judges(path: str) -> bool:
    """Return whether a file that `evaluate` reads holds texts to judge by; the teacher's files do not."""
    return path.startswith("data/") and Path(path).name != "teacher"


def _git(root: Path, *arguments: str) -> str:
    """Return the output of git; an empty text where there is no git, which does not stop a registration."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main("register", run, torch=False)
