"""The registered model that writes, as code: a prompt or a text in, what the model says to it out.

MLflow runs this file where the model is loaded, with the export and the package ffn2moe beside it. It needs
numpy, onnxruntime and the tokenizer's library; no torch.
"""

from __future__ import annotations

from typing import Any

import mlflow
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel


class Writer(PythonModel):
    """Greedy continuations of prompts, or answers to texts, by the plan the export chose."""

    def load_context(self, context: Any) -> None:
        from ffn2moe.runtime import open_export

        self.export = open_export(context.artifacts["export"])

    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[str]:
        """One text a prompt, without the prompt; a request that holds none, an empty or a too long one is refused."""
        empty = [index for index, text in enumerate(model_input) if not text.strip()]
        if not model_input or empty:
            cause = f"prompt {empty[0]} is empty" if empty else "there is no prompt"
            raise MlflowException(
                f'{cause}; send a list of texts: {{"inputs": ["Once upon a time"]}}',
                error_code=INVALID_PARAMETER_VALUE,
            )
        try:
            return ["".join(self.export.generate(text)) for text in model_input]
        except ValueError as error:  # a prompt that is longer than the model can hold
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None


mlflow.models.set_model(Writer())
