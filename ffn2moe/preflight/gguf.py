"""Check whether llama.cpp can run what is made: the GGUF file of a container or of a dense student."""

from __future__ import annotations

from collections.abc import Iterator

from ffn2moe.preflight.case import Case
from ffn2moe.preflight.doubt import Doubt


def gguf(case: Case) -> Iterator[str]:
    """Find what forbids a GGUF file: an error where one is asked for, else a doubt."""
    from ffn2moe.containers.gguf.types import width_in_words
    from ffn2moe.containers.gguf.write import carried, with_widths

    asked, dense, spec, container = case.request, case.dense, case.spec, case.container
    if dense.head != "causal" or (container is None and not spec.is_dense):
        if asked.gguf:
            why = case.container_reason if dense.head == "causal" else f"{asked.source} is no language model"
            raise ValueError(
                f"{asked.call('gguf', list(asked.gguf))}, but llama.cpp reads language models, and experts of a native "
                f"container alone ({why}): set {asked.call('gguf', [])}"
            )
        return
    try:
        found, _, _ = carried(container.name if container else dense.config.model_type, dense.config, dense.reader)
        if case.widths_by_need:
            with_widths(found)
    except ValueError as error:
        if asked.gguf:
            raise ValueError(f"{asked.call('gguf', list(asked.gguf))}, but {error}") from None
        yield Doubt(f"no file for llama.cpp can be made of it: {error}")
        return
    yield width_in_words(container.expert_width(spec) if container else spec.ffn_width)
