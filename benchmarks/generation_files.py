"""Make the folder of files that `benchmarks.generation` times.

    python -m benchmarks.generation_files candidates ./my-llama half quarter half-pruned

of a dense language model and the students that `ffn2moe convert` made of it. The folder gets, of each, GGUF files in
Q8_0 and Q4_0 (of a mixture: of its native container), and an export with the plans of few bits of the installed
engines. What is there already stays.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.page import complain
from ffn2moe import cli
from ffn2moe.dense.load import load_dense
from ffn2moe.moe import checkpoint
from ffn2moe.onnx.parity import random_samples
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.progress import Screen
from ffn2moe.runtime.engines import installed_engines
from ffn2moe.runtime.files import MANIFEST
from ffn2moe.runtime.plans import plan_of, plans_of

GGUF_TYPES = ("q8_0", "q4_0")
SAMPLES = 2  # texts on which each plan is compared with PyTorch: `generation` judges it anyway


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation_files", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the folder to fill")
    parser.add_argument("dense", help="the dense model, as `ffn2moe convert` takes it")
    parser.add_argument("students", type=Path, nargs="+", help="what `ffn2moe convert` made of it")
    options = parser.parse_args(arguments)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with Screen() as screen:
            for index, student in enumerate(options.students):
                _export(options.folder / student.name, options.dense if index == 0 else None, student, screen)
        sources = {"dense": options.dense, **{student.name: str(student) for student in options.students}}
        for name, source in sources.items():
            for kind in GGUF_TYPES:
                file = options.folder / f"{name}-{kind}.gguf"
                if not file.exists() and cli.main(["gguf", source, str(file), "--type", kind]):
                    return 2
    except (ValueError, OSError) as error:
        return complain(error)
    return 0


def _export(out: Path, dense: str | None, student: Path, screen: Screen) -> None:
    """Write an export with the plans of few bits, those of the dense model too where it is given."""
    if (out / MANIFEST).is_file():
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with screen.step(f"reading {student}"):
        spec = checkpoint.load_spec(student / "checkpoint")
        model = checkpoint.load(student / "checkpoint")
        teacher = load_dense(dense, head=spec.head)[0] if dense else None
        reader = _tokenizer(student)
    plans = [
        name
        for name in plans_of(spec.head, installed_engines(), without_experts=spec.is_dense)
        if plan_of(name).is_quantised
    ]
    samples = random_samples(model, spec, SAMPLES)
    manifest = export_model(model, teacher, reader, spec, partial, plans=plans, samples=samples, track=screen.track)
    write_manifest(partial, manifest)
    os.replace(partial, out)


def _tokenizer(student: Path) -> object:
    from transformers import AutoTokenizer

    folder = student / "tokenizer"
    return AutoTokenizer.from_pretrained(folder if folder.is_dir() else student / "checkpoint")


if __name__ == "__main__":
    sys.exit(main())
