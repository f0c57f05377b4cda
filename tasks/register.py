"""Stage 9: the export as a version of a registered model, and the aliases it has earned.

`challenger` always points to the newest version that answers; `champion` only to one that passes the gate of
params.yaml. Whatever fails after an alias was moved moves it back, and the version goes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
from ruamel.yaml import YAML

from ffn2moe.runtime import open_export
from tasks.measures import at, headline
from tasks.params import Params
from tasks.registry import Registry
from tasks.stage import StageRun, main, numbers

EXAMPLE = ("A mixture of experts runs a part of itself for each token.", "The weather is fine today.")
# What the served model imports, beside the package ffn2moe that travels with it.
REQUIREMENTS = ("numpy", "onnx", "onnxruntime-gpu", "tokenizers")
SAME = 1e-5  # of components of unit vectors: the same graph, computed twice
SERVED = {  # the code of a model with each head
    "embedding": "served_model.py",
    "causal": "served_text.py",
    "seq2seq": "served_text.py",
    "classification": "served_classifier.py",
}


def run(stage: StageRun) -> None:
    """Registers exports/NAME, writes metrics/register.json; ValueError if the version answers wrongly."""
    root, params = stage.root, stage.params
    export = root / "exports" / params.name
    plan = _json(export / "plan.json")
    quality = _json(root / "metrics" / "evaluate.json")
    verdict = judge(params, quality, plan)
    aliases = ["challenger"] if verdict["refused"] else ["challenger", "champion"]

    registry = Registry(root, params.model_name)
    scratch = root / ".cache"
    scratch.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder, ExitStack() as undo:
        served = slim_copy(export, Path(folder) / "export", plan)
        version = undo.enter_context(
            registry.added(
                code=root / "tasks" / SERVED[quality.get("head", "embedding")],
                export=served,
                packages=[root / "ffn2moe"],
                requirements=[f"{name}=={metadata.version(name)}" for name in REQUIREMENTS],
                example=EXAMPLE,
            )
        )
        registry.tag(version, tags(root, params, quality, verdict, plan))
        check_answers(registry, version, export)
        for alias in aliases:
            undo.enter_context(registry.moved(alias, version))
        stage.write_json(
            "metrics/register.json",
            {"model": registry.model, "version": version, "aliases": aliases, **verdict},
        )
    stage.say(f"{registry.model} version {version}, alias {' and '.join(aliases)}")
    for reason in verdict["refused"]:
        stage.say(f"not champion: {reason}")


def judge(params: Params, quality: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """The two figures the gate looks at, and why `champion` is refused, if it is.

    The speed-up is that of the whole workload over the best dense plan of each shape, the lowest one over the numbers
    of threads.
    """
    gate = params.gate
    retention = float(at(quality["retention"], headline(quality).path))
    found = min(plan["by_threads"], key=lambda one: one["speedup_vs_best_dense"])
    speedup = float(found["speedup_vs_best_dense"])
    refused = []
    if retention < gate.min_retention:
        refused.append(f"retention {retention:.4f} is below gate.min_retention = {gate.min_retention}")
    if speedup <= gate.min_speedup:
        refused.append(
            f"the workload runs at {speedup:.2f}x the best dense plan, on {' and '.join(found['plans'])}, "
            f"not above gate.min_speedup = {gate.min_speedup}"
        )
    return {"retention": retention, "speedup_vs_best_dense": speedup, "refused": refused}


def slim_copy(export: Path, target: Path, plan: Mapping[str, Any]) -> Path:
    """The export with the plans that were chosen only, and without the checkpoint: what serving needs."""
    chosen = plan["plans"]
    manifest = _json(export / "manifest.json")
    manifest["plans"] = {name: manifest["plans"][name] for name in chosen}
    for name in {file for entry in manifest["plans"].values() for file in (entry["file"], *entry.get("more", {}))}:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(export / name, target / name)
    shutil.copytree(export / "tokenizer", target / "tokenizer")
    slim = {**plan, "timings": {name: plan["timings"][name] for name in chosen}}
    for name, payload in (("manifest.json", manifest), ("plan.json", slim)):
        (target / name).write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return target


def check_answers(registry: Registry, version: int, export: Path) -> None:
    """Asks the registered version itself; ValueError unless it answers as the export does."""
    opened = open_export(export)
    answer = registry.predict(version, EXAMPLE)
    if hasattr(opened, "generate"):
        same = list(answer) == ["".join(opened.generate(text)) for text in EXAMPLE]
    else:
        expected = opened.encode(list(EXAMPLE)) if hasattr(opened, "encode") else probabilities(opened)
        same = numpy.shape(answer) == expected.shape and numpy.allclose(answer, expected, atol=SAME)
    if not same:
        raise ValueError(
            f"version {version} of {registry.model} does not answer as {export} does; "
            "it was removed again, the aliases are where they were; to try again: dvc repro -s register"
        )


def probabilities(opened: Any) -> numpy.ndarray:
    """Of each class, for the example."""
    logits_NC = opened.classify(list(EXAMPLE)).astype(numpy.float64)
    share_NC = numpy.exp(logits_NC - logits_NC.max(-1, keepdims=True))
    return share_NC / share_NC.sum(-1, keepdims=True)


def tags(
    root: Path,
    params: Params,
    quality: Mapping[str, Any],
    verdict: Mapping[str, Any],
    plan: Mapping[str, Any],
) -> dict[str, str]:
    """What a version is made of, and how good it is: git, DVC hashes of what was exported, figures."""
    commit = os.environ.get("FFN2MOE_GIT_COMMIT") or _git(root, "rev-parse", "HEAD")
    dirty = os.environ.get("FFN2MOE_GIT_DIRTY") or str(
        bool(_git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"))
    )
    found = {
        "git.commit": commit,
        "git.dirty": dirty.lower(),
        "default_plan": str(plan["default_plan"]),
        "speedup_vs_best_dense": f"{verdict['speedup_vs_best_dense']:.4f}",
    }
    found |= {f"retention.{key}": f"{value:.6f}" for key, value in numbers(quality["retention"])}
    found |= {f"student.{key}": f"{value:.6f}" for key, value in numbers(quality["student"])}
    lock = root / "dvc.lock"
    if lock.is_file():
        stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8")).get("stages", {})
        for out in stages.get("export", {}).get("outs", []):
            found[f"dvc.md5.{Path(out['path']).relative_to(f'exports/{params.name}')}"] = out["md5"]
    return found


def _git(root: Path, *arguments: str) -> str:
    """What git says; nothing where there is no git, which does not stop a registration."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main("register", run, torch=False)
