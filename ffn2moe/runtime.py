"""Open an export and use it: text in, embeddings out, by any of its plans.

Needs numpy, onnxruntime and tokenizers, and no torch: an export is light to serve.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import onnxruntime
    from tokenizers import Tokenizer

Plan = Literal["dense", "dense8", "fused", "sorted", "sorted8"]  # what they are: ffn2moe.onnx_plans
PLANS: tuple[Plan, ...] = get_args(Plan)
DENSE_PLANS: tuple[Plan, ...] = ("dense", "dense8")
INT8_PLANS: tuple[Plan, ...] = ("dense8", "sorted8")
CPU = ("CPUExecutionProvider",)
MANIFEST, PLAN_FILE = "manifest.json", "plan.json"
BATCH_TOKENS = 1024  # at once: more leave the processor's cache (int8 plans: a fifth slower at 4096)
UNMEASURED_PLAN = "sorted"  # where no benchmark has chosen: float32 and standard ops, good everywhere


def session(
    graph: str | Path | bytes, *, threads: int | None = None, providers: Sequence[str] = CPU
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on `threads` threads (None: one a core), on the named execution providers.

    Denormal numbers are taken as zero: they are what a masked token's attention comes to, they change nothing,
    and a CPU multiplies them many times slower. (ONNX Runtime decides this for the process, in its first session.)
    """
    import onnxruntime as ort

    available = ort.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ValueError(
                f"the execution provider {provider!r} is not in this onnxruntime; it has: {', '.join(available)}"
            )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; a failed run raises anyway
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if threads == 1:  # a lone thread need not wait for others
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = graph if isinstance(graph, bytes) else str(graph)
    if tuple(providers) != CPU:  # a provider that cannot start says so below, once; not in red, and twice
        ort.set_default_logger_severity(4)
    opened = ort.InferenceSession(content, options, providers=list(providers))
    started = opened.get_providers()
    if started[0] != providers[0]:
        raise ValueError(
            f"the execution provider {providers[0]!r} does not start on this machine (no such device, or its driver "
            f"or libraries are missing); leave it out to use {started[0]}"
        )
    return opened


class Export:
    """An open export. `encode` texts, or `run` token ids; `plan` says how it is executed."""

    def __init__(
        self,
        path: Path,
        plan: str,
        manifest: Mapping[str, Any],
        graph: onnxruntime.InferenceSession,
        tokenizer: Tokenizer,
    ) -> None:
        self.path = path
        self.plan = plan
        self.manifest = manifest
        self._graph = graph
        self._tokenizer = tokenizer
        self._pad_id = _padding_id(path / "tokenizer", tokenizer)

    def __repr__(self) -> str:
        return f"Export({str(self.path)!r}, plan={self.plan!r})"

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(self.manifest["spec"]["width"])

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the export's length."""
        if isinstance(texts, str):
            raise ValueError("encode takes a list of texts: write encode([text])")
        for index, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text {index} is empty: it has no meaning to encode; leave it out")
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Embeddings of unit length, float32 [N, D], in the order of `texts`; ValueError for an empty text.

        Texts are batched with others of their length, up to `batch_tokens` with padding. In an int8 plan the scale
        of the activations is that of the batch, so an embedding depends a little on its neighbours.
        """
        ids = self.token_ids(texts)
        embeddings_ND = np.empty((len(ids), self.width), dtype=np.float32)
        for batch in batches_by_length(ids, batch_tokens):
            ids_BL, mask_BL = pad([ids[index] for index in batch], self._pad_id)
            embeddings_ND[batch] = self._graph.run(
                ["sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
            )[0]
        return embeddings_ND

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask of the texts as one batch, int64 [B, L] each."""
        return pad(self.token_ids(texts), self._pad_id)

    def run(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [B, L, D] and embeddings [B, D] of token ids and their mask, int64 [B, L]."""
        hidden_BLD, embedding_BD = self._graph.run(
            ["last_hidden_state", "sentence_embedding"], {"input_ids": ids_BL, "attention_mask": mask_BL}
        )
        return hidden_BLD, embedding_BD


def open_export(
    path: str | Path,
    plan: str | None = None,
    threads: int | None = None,
    providers: Sequence[str] = CPU,
) -> Export:
    """Open the export in folder `path`.

    `plan` None takes the one that the benchmark chose (plan.json), or `sorted` where none has run. The graph must
    have the sha256 of the manifest, and a plan with a MoE op must pass `self_test` on this runtime.
    Raises FileNotFoundError or ValueError, with cause and remedy.
    """
    path = Path(path)
    manifest = read_manifest(path)
    plans = manifest["plans"]
    plan = plan or default_plan(path, plans)
    if plan not in plans:
        raise ValueError(f"{path} has no plan {plan!r}; it has: {', '.join(sorted(plans))}")
    file = checked_file(path, plans[plan])
    if plan == "fused":
        self_test(manifest["spec"]["activation"], providers)
    return Export(
        path,
        plan,
        manifest,
        session(file, threads=threads, providers=providers),
        load_tokenizer(path / "tokenizer", int(manifest["spec"]["max_length"])),
    )


# --- the files of an export -----------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the export in folder `path`."""
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not an export: it has no {MANIFEST}; name a folder like exports/minilm (make run writes it)"
        )
    return _read_json(file, ("plans", "spec"))


def read_plan(path: Path) -> dict[str, Any] | None:
    """What the benchmark wrote beside the manifest; None where it has not run."""
    file = path / PLAN_FILE
    return _read_json(file, ("default_plan", "timings")) if file.is_file() else None


def default_plan(path: Path, plans: Mapping[str, Any]) -> str:
    """The plan that the benchmark chose, or `sorted` where none has run."""
    chosen = read_plan(path)
    return str(chosen["default_plan"]) if chosen else UNMEASURED_PLAN if UNMEASURED_PLAN in plans else min(plans)


def checked_file(path: Path, entry: Mapping[str, Any]) -> Path:
    """The graph of one plan; ValueError if its bytes are not those that were exported."""
    file = path / entry["file"]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole folder again, or make the export again")
    if sha256(file) != entry["sha256"]:
        raise ValueError(
            f"{file} is damaged (its sha256 is not the one in {MANIFEST}): "
            "copy the folder again, or make the export again"
        )
    return file


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy it again, or make the export again") from error
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}: it is not of this version; make the export again")
    return content


# --- text to batches ------------------------------------------------------------------------------------------------


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The fast tokenizer saved in `folder`, cutting texts to `max_length` tokens and padding none."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: copy the whole export again, or make it again")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return tokenizer


def _padding_id(folder: Path, tokenizer: Tokenizer) -> int:
    """The id of the padding token; masked positions are never read, so 0 does where there is none."""
    config = folder / "tokenizer_config.json"
    token = _read_json(config, ()).get("pad_token") if config.is_file() else None
    name = token["content"] if isinstance(token, dict) else token
    return (tokenizer.token_to_id(name) if name else None) or 0


def batches_by_length(ids: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of texts of about one length that hold `batch_tokens` at most.

    A longer text is a batch by itself.
    """
    batch: list[int] = []
    for index in sorted(range(len(ids)), key=lambda index: -len(ids[index])):
        if batch and (len(batch) + 1) * len(ids[batch[0]]) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [B, L], padded on the right."""
    ids_BL = np.full((len(ids), max(map(len, ids))), pad_id, dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for row, tokens in enumerate(ids):
        ids_BL[row, : len(tokens)] = tokens
        mask_BL[row, : len(tokens)] = 1
    return ids_BL, mask_BL


# --- the MoE op on this runtime -------------------------------------------------------------------------------------


def self_test(activation: str, providers: Sequence[str] = CPU) -> float:
    """Checks that this runtime's `com.microsoft.MoE` routes, weighs and activates as the export expects.

    The op changed silently between releases (no softmax in one, hard-coded constants in another), so a tiny layer
    is compared with float64 arithmetic. Gives the largest difference; RuntimeError where it is not the op we know.
    GELU may be the erf or the tanh form: kernels differ, and the manifest says what was measured.
    """
    E, K, D, M, T = 4, 2, 8, 8, 6
    random = np.random.default_rng(0)
    x_TD = random.standard_normal((T, D)).astype(np.float32)
    w_in_EMD = random.standard_normal((E, M, D)).astype(np.float32)
    b_in_EM = random.standard_normal((E, M)).astype(np.float32)
    w_out_EDM = random.standard_normal((E, D, M)).astype(np.float32)
    chosen_TK = np.stack([random.permutation(E)[:K] for _ in range(T)])
    logits_TE = np.full((T, E), -1e4, dtype=np.float32)
    np.put_along_axis(logits_TE, chosen_TK, 0.0, axis=1)

    model = _moe_graph(activation, K, w_in_EMD, b_in_EM, w_out_EDM)
    try:
        (y_TD,) = session(model, threads=1, providers=providers).run(None, {"x": x_TD, "logits": logits_TE})
    except Exception as error:  # whatever the runtime throws: the op is not usable
        raise RuntimeError(
            f"this onnxruntime cannot run com.microsoft.MoE ({error}); open the export with plan='sorted'"
        ) from error

    def layer(act: Any) -> np.ndarray:
        h_TEM = act(np.einsum("td,emd->tem", x_TD, w_in_EMD, dtype=np.float64) + b_in_EM)
        y_TED = np.einsum("tem,edm->ted", h_TEM, w_out_EDM)
        return np.take_along_axis(y_TED, chosen_TK[:, :, None], axis=1).mean(1)

    difference = min(float(np.abs(y_TD - layer(act)).max()) for act in _ACTIVATIONS[activation])
    if not difference < 1e-4:
        raise RuntimeError(
            f"com.microsoft.MoE of this onnxruntime computes something else (off by {difference:.2g}): "
            "its routing or activation differs; open the export with plan='sorted', or use another onnxruntime"
        )
    return difference


def _erf_gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def _tanh_gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "gelu": (_tanh_gelu, _erf_gelu),
    "gelu_tanh": (_tanh_gelu, _erf_gelu),
    "relu": (lambda z: np.maximum(z, 0),),
    "silu": (lambda z: z / (1 + np.exp(-z)),),
}


def _moe_graph(
    activation: str, num_active: int, w_in_EMD: np.ndarray, b_in_EM: np.ndarray, w_out_EDM: np.ndarray
) -> bytes:
    """A model of one MoE node, as the canonical graph holds it."""
    from onnx import TensorProto, helper, numpy_helper

    width, experts = w_in_EMD.shape[2], w_in_EMD.shape[0]
    node = helper.make_node(
        "MoE",
        ["x", "logits", "fc1", "fc1_bias", "fc2"],
        ["y"],
        domain="com.microsoft",
        k=num_active,
        activation_type="gelu" if activation == "gelu_tanh" else activation,
        normalize_routing_weights=1,
    )
    graph = helper.make_graph(
        [node],
        "self_test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", width]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", experts]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", width])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("fc1", w_in_EMD), ("fc1_bias", b_in_EM), ("fc2", w_out_EDM))
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
