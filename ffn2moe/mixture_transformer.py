"""Open a mixture in sentence-transformers with PyTorch: modules.json of a folder names the class below.

`ffn2moe.clients.sentence_transformers_folder` writes such a folder. Other backends open its graph as the library does.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.modules import Transformer

from ffn2moe.moe import checkpoint


class MixtureTransformer(Transformer):
    """The first module of a sentence encoder, with the mixtures of a checkpoint in the place of its FFNs."""

    def _load_model(self, model_name_or_path: str, *arguments: Any, **options: Any) -> Any:
        """Return the model of the folder."""
        if self.backend != "torch":
            return super()._load_model(model_name_or_path, *arguments, **options)
        self.spec = checkpoint.load_spec(model_name_or_path)
        return checkpoint.load(model_name_or_path)

    def save(self, output_path: str, *arguments: Any, **options: Any) -> None:
        """Write model, tokenizer and settings, as this class opens them."""
        if self.backend != "torch":
            super().save(output_path, *arguments, **options)
            return
        checkpoint.save(self.model, self.tokenizer, self.spec, output_path)
        self.save_config(output_path)
