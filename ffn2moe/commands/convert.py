"""`ffn2moe convert`: make a mixture of experts of a dense model, in one process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn2moe.choices import HEADS
from ffn2moe.commands._command import Command, facts, silence_transformers
from ffn2moe.commands._settings import add_settings, settings_of

if TYPE_CHECKING:
    from ffn2moe.progress import Screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")


def run(options: argparse.Namespace) -> int:
    from ffn2moe.progress import Screen

    settings = settings_of(options)
    with Screen() as screen:
        with screen.step("importing PyTorch"):
            from ffn2moe.convert import convert
        silence_transformers()
        try:
            manifest = convert(options.model, options.out, settings, say=screen.say, track=screen.track)
        except KeyboardInterrupt:
            screen.say(f"stopped: run the same command again to resume from {options.out}.partial")
            raise
        _show(screen, options.out, manifest)
    return 0


def _show(screen: Screen, out: Path, manifest: dict[str, Any]) -> None:
    """Print what was made, how well it keeps the dense model's output, and the command to use it with."""
    from ffn2moe.convert import summary
    from ffn2moe.spec import MoESpec

    spec, quality = MoESpec.from_dict(manifest["spec"]), manifest["convert"]["quality"]
    shared = " and a shared one" if any(shape.shared_width for shape in spec.stacks) else ""
    share = f"{100 * spec.active_share:.0f} % of the FFNs is active"
    experts = "none" if spec.is_dense else f"{spec.num_active} of {spec.num_experts}{shared}"
    rows = [("experts", f"{experts}: {share}")]
    if any(shape.layers_kept or shape.teacher_ffn_width for shape in spec.stacks):
        kept = [f"{shape.describe_layers()}, {shape.describe_neurons()} of each FFN" for shape in spec.stacks]
        rows.append(("kept", "; ".join(kept)))
    rows += [(name, summary(found)) for name, found in quality.items()]
    opens = "transformers; needs no code of ours" if spec.is_ordinary else "ffn2moe.load"
    rows.append(("checkpoint", f"{out / 'checkpoint'} ({opens})"))
    if "container" in manifest:
        folder = out / manifest["container"]["folder"]
        rows.append(("container", f"{folder} (transformers, vLLM, SGLang; needs no code of ours)"))
        rows.append(("llama.cpp", f"ffn2moe gguf {out} {out / 'model.gguf'} --type q8_0"))
    if manifest["plans"]:
        rows.append(("ONNX", f"{', '.join(manifest['plans'])} in {out}"))
    screen.print(facts(rows))
    screen.say(f"next: {_next(out, manifest, spec.head)}")


def _next(out: Path, manifest: dict[str, Any], head: str) -> str:
    if not manifest["plans"]:
        return f'python -c "import ffn2moe; model = ffn2moe.load({str(out / "checkpoint")!r})"'
    if manifest["model"].get("chats"):
        return f'ffn2moe generate {out} "Who are you?" --chat'
    if head == "causal":
        return f'ffn2moe generate {out} "Once upon a time"'
    if head == "embedding":
        return f'ffn2moe encode {out} "a text"'
    if HEADS[head].classifies and manifest["model"]["reads"] == "text":
        return f'ffn2moe classify {out} "a text"'
    return f"ffn2moe verify {out}"


ROW = Command("make a mixture of experts of a dense model; a stopped conversion resumes", add_arguments, run)
