"""Keep the import of before version 0.2: `ffn2moe.clients.sentence_transformers_folder`."""

from ffn2moe.onnx.sentence_transformers import sentence_transformers_folder

__all__ = ["sentence_transformers_folder"]
