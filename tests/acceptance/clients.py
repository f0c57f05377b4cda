"""Open an export in sentence-transformers, in a separate environment, and compare the embeddings.

    python -m tests.acceptance.clients exports/minilm

optimum-onnx needs another version of transformers than this project, so the environment is separate. It is made once,
in --environment.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.page import complain, console_of, working
from ffn2moe.onnx.sentence_transformers import sentence_transformers_folder
from ffn2moe.runtime.export import open_export
from ffn2moe.runtime.files import read_manifest

PACKAGES = (
    "torch==2.13.0",
    "sentence-transformers==5.7.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "onnxruntime",
)
TEXTS = (
    "A mixture of experts runs a part of itself for each token.",
    "The weather is fine today.",
    "Return the sum of the values along an axis.",
    "Stocks fell sharply on Friday as investors feared that interest rates would stay high for longer than hoped.",
    "no",
)
TOLERANCE = 1e-5  # for components of unit vectors
CLIENT = """
import json, sys
from sentence_transformers import SentenceTransformer
assert "ffn2moe" not in sys.modules
options = {"file_name": "model.onnx", "subfolder": "onnx", "provider": "CPUExecutionProvider"}
model = SentenceTransformer(sys.argv[1], backend="onnx", local_files_only=True, model_kwargs=options)
json.dump(model.encode(json.load(sys.stdin)).tolist(), open(sys.argv[2], "w"))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if the embeddings differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.acceptance.clients", description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="the export, for example exports/minilm")
    parser.add_argument("--plan", help="plan (default: the portable one)")
    parser.add_argument("--environment", type=Path, default=Path(".cache/sentence-transformers"))
    options = parser.parse_args(arguments)
    console = console_of()
    try:
        difference = largest_difference(options.export, options.plan, options.environment, console)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        return complain(error)
    same = difference <= TOLERANCE
    console.print(
        f"{', '.join(PACKAGES[1:])}: embeddings of {len(TEXTS)} texts differ by {difference:.1e} from this project's "
        f"({'within' if same else 'more than'} {TOLERANCE:.0e})"
    )
    return 0 if same else 1


def largest_difference(export: Path, plan: str | None, environment: Path, console: Console) -> float:
    """Return the largest difference between the embeddings of sentence-transformers and those of the runtime."""
    python = environment.resolve() / "bin" / "python"
    if not python.exists():
        install = [python, "-m", "pip", "install", "--quiet"]
        with working(console, f"making {environment} ({', '.join(PACKAGES)})"):
            venv.create(environment, with_pip=True)
            subprocess.run([*install, PACKAGES[0]], check=True, stderr=subprocess.DEVNULL)
            subprocess.run([*install, *PACKAGES], check=True, stderr=subprocess.DEVNULL)
    with TemporaryDirectory() as scratch:
        plan = plan or read_manifest(export).get("portable")
        folder = sentence_transformers_folder(export, Path(scratch) / "model", plan)
        answer = Path(scratch) / "answer.json"
        # Another folder and -I keep this project from being imported.
        subprocess.run(
            [python, "-I", "-c", CLIENT, folder, answer], input=json.dumps(TEXTS), text=True, cwd=scratch, check=True
        )
        theirs = json.loads(answer.read_text())
    ours = open_export(export, plan).encode(list(TEXTS)).tolist()
    return max(abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
