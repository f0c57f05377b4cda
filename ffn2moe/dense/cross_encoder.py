"""Read what a cross-encoder of sentence-transformers adds to a transformers classifier, and refuse what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ffn2moe.choices import cross_encoder_activation, problem_of

FILE = "config_sentence_transformers.json"
_ENTAILMENT = {"entailment", "contradiction"}  # labels of a premise and a hypothesis


def declare_activation(config: Any, folder: str | Path) -> None:
    """Put the activation of a cross-encoder's folder into its config, where releases before 5 kept it.

    Do nothing for another folder. ValueError for a prompt, or a module beside the transformers model.
    """
    file = Path(folder) / FILE
    written = json.loads(file.read_text()) if file.is_file() else {}
    if written.get("model_type") != "CrossEncoder":
        return
    prompt = (written.get("prompts") or {}).get(written.get("default_prompt_name"))
    if prompt:
        raise ValueError(
            f"the cross-encoder {folder} puts the prompt {prompt!r} before every first text, which has no form here: "
            f"set default_prompt_name in its {FILE} to null, and give texts that begin with it"
        )
    modules = Path(folder) / "modules.json"
    names = [row["type"].rpartition(".")[-1] for row in json.loads(modules.read_text())] if modules.is_file() else []
    if names[1:]:
        raise ValueError(
            f"the cross-encoder {folder} has the modules {', '.join(names[1:])} after its {names[0]}, which have no "
            "form here: only a classifier of transformers can be converted"
        )
    config.sentence_transformers = {"activation_fn": written.get("activation_fn")}


def reads_pairs(config: Any) -> bool:
    """Return whether a classifier reads pairs of texts, as far as its config tells: rerankers and entailment do."""
    if hasattr(config, "sentence_transformers") or cross_encoder_activation(config) is not None:
        return True
    labels = {str(label).lower() for label in config.id2label.values()}
    return problem_of(config) == "one_label" or bool(labels & _ENTAILMENT)
