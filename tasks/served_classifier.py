"""The registered classifier, as code: texts in, the probability of each class out.

MLflow runs this file where the model is loaded, with the export and the package ffn2moe beside it. It needs
numpy, onnxruntime and the tokenizer's library; no torch.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.pyfunc import PythonModel


class Classifier(PythonModel):
    """Probabilities of the classes, in the order of the teacher's config, by the plan the export chose."""

    def load_context(self, context: Any) -> None:
        from ffn2moe.runtime import open_export

        self.export = open_export(context.artifacts["export"])

    def predict(self, model_input: list[str], params: dict[str, Any] | None = None) -> list[list[float]]:
        """One row of probabilities a text; a request that holds none, or an empty one, is refused."""
        empty = [index for index, text in enumerate(model_input) if not text.strip()]
        if not model_input or empty:
            cause = f"text {empty[0]} is empty" if empty else "there is no text"
            raise MlflowException(
                f'{cause}; send a list of texts: {{"inputs": ["A sentence."]}}',
                error_code=INVALID_PARAMETER_VALUE,
            )
        logits_NC = self.export.classify(model_input).astype(np.float64)
        share_NC = np.exp(logits_NC - logits_NC.max(-1, keepdims=True))
        return (share_NC / share_NC.sum(-1, keepdims=True)).tolist()


mlflow.models.set_model(Classifier())
