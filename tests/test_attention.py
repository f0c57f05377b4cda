"""The operator's attention against float64 arithmetic, and which attention of a model it replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attention as benchmark
from ffn2moe.dense.load import load_dense
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.runtime import native
from ffn2moe.runtime.engines import _openvino_attention
from ffn2moe.runtime.engines._openvino_attention import fuse_attention, has_attention
from ffn2moe.runtime.export import open_graphs
from tests.conftest import make_tiny_bert
from tests.mixtures import carve
from tests.texts import make_texts

FILES = {"ov-dense": "dense", "ov-native": "ov-native"}

SIZES = [(2, 37, 3, 32), (1, 16, 2, 64), (3, 130, 2, 96), (4, 1, 1, 32), (1, 64, 4, 32)]  # B, L, H, N


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The operator as built, or built here; it must have a path for this processor."""
    try:
        found = native.library() if native.is_built() else native.build(tmp_path_factory.mktemp("native"))
    except FileNotFoundError as why:
        pytest.skip(str(why))
    if not has_attention(found):
        pytest.skip("this processor has no AMX, which the operator's attention is for")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: found)
        yield found


def attention(
    H: int,
    N: int,
    *,
    mask: str = "keep",
    scale: float | None = None,
    causal: bool = False,
    shared: bool = False,
    turned: bool = True,
) -> Any:
    """A model of one layer's attention, as OpenVINO reads it from an encoder's graph."""
    from openvino import Model, PartialShape
    from openvino import opset13 as op

    def number(value: Any, kind: Any = np.int64) -> Any:
        return op.constant(np.array(value, dtype=kind))

    given, heads = [], []
    for index, name in enumerate(("query", "key", "value")):
        own = 1 if shared and index else H
        given.append(op.parameter(PartialShape([-1, -1, own * N]), np.float32, name))
        apart = op.reshape(given[-1], number([0, 0, own, N]), True)
        heads.append(op.transpose(apart, number([0, 2, 1, 3])))
    keep = op.parameter(PartialShape([-1, -1]), np.int64, "keep")
    keep_B11L = op.unsqueeze(op.convert(keep, "boolean"), number([1, 2]))
    size_B1LL = op.concat(
        [number([1]), number([1]), op.gather(op.shape_of(keep), number([1]), number(0)), number([1])], 0
    )
    spread = op.broadcast(keep_B11L, size_B1LL, broadcast_spec="BIDIRECTIONAL")
    masks = {
        "keep": lambda: op.select(spread, number(0, np.float32), number(-1e9, np.float32)),
        "boolean": lambda: keep_B11L,
        "none": lambda: None,
        "of each token": lambda: op.logical_or(spread, op.equal(spread, spread)),
        "numbers": lambda: op.multiply(op.convert(spread, "f32"), number(0.5, np.float32)),
    }
    inputs = [*heads, masks[mask]()]
    if scale is not None:
        inputs.append(number(scale, np.float32))
    found = op.scaled_dot_product_attention(*(one for one in inputs if one is not None), causal=causal)
    back = op.transpose(found, number([0, 2, 1, 3])) if turned else op.relu(found)
    whole = op.reshape(back, number([0, 0, H * N] if turned else [0, 0, -1]), True)
    return Model([op.result(whole)], [*given, keep], "attention")


def run(model: Any, arrays: list[np.ndarray], library: Path | None, *, threads: int = 1) -> np.ndarray:
    import openvino as ov

    core = ov.Core()
    if library is not None:
        core.add_extension(str(library))
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.infer(arrays)
    return np.array(request.get_output_tensor(0).data)


def exact(arrays: list[np.ndarray], H: int, scale: float) -> np.ndarray:
    """Attention in float64; 0 for the tokens of a text that keeps none."""
    query, key, value = (array.astype(np.float64) for array in arrays[:3])
    B, L, D = query.shape
    q, k, v = (array.reshape(B, L, H, D // H).transpose(0, 2, 1, 3) for array in (query, key, value))
    scores_BHLL = np.where(arrays[3][:, None, None] != 0, scale * q @ k.transpose(0, 1, 3, 2), -np.inf)
    some_B = arrays[3].any(1)
    weights_BHLL = np.exp(scores_BHLL - np.where(np.isinf(most := scores_BHLL.max(-1, keepdims=True)), 0, most))
    weights_BHLL /= np.where(some_B[:, None, None, None], weights_BHLL.sum(-1, keepdims=True), 1)
    return (weights_BHLL @ v).transpose(0, 2, 1, 3).reshape(B, L, D)


def numbers(B: int, L: int, D: int, seed: int = 0) -> list[np.ndarray]:
    """Queries, keys and values, and what is kept of texts: a part, from any place on; nothing of a third one."""
    random = np.random.default_rng(seed)
    arrays = [random.standard_normal((B, L, D)).astype(np.float32) for _ in range(3)]
    keep_BL = random.random((B, L)) < np.linspace(1.0, 0.4, B)[:, None]
    keep_BL[2:3] = False
    return [*arrays, keep_BL.astype(np.int64)]


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("B", "L", "H", "N"), SIZES)
@pytest.mark.parametrize("scale", [None, 0.31, 4.0])
def test_it_computes_attention_over_the_kept_tokens(library, B, L, H, N, scale):
    model, arrays = attention(H, N, scale=scale), numbers(B, L, H * N)
    assert fuse_attention(model, library) == 1
    found = run(model, arrays, library)
    wanted = exact(arrays, H, scale or N**-0.5)
    # Queries, keys, values, weights and the output are rounded to bfloat16.
    assert off(found, wanted) < 0.02 if scale == 4.0 else off(found, wanted) < 0.008
    assert not found[arrays[3].sum(1) == 0].any()


@pytest.mark.parametrize("mask", ["boolean", "none"])
def test_it_reads_masks_of_every_form_that_is_the_same_for_all_tokens(library, mask):
    model, arrays = attention(2, 32, mask=mask), numbers(2, 21, 64)
    if mask == "none":
        arrays[3][:] = 1
    assert fuse_attention(model, library) == 1
    assert off(run(model, arrays, library), exact(arrays, 2, 32**-0.5)) < 0.008


@pytest.mark.parametrize(
    "kind",
    [
        {"mask": "of each token"},
        {"mask": "numbers"},
        {"causal": True, "mask": "none"},
        {"shared": True},
        {"turned": False},
        {"N": 16},
        {"N": 48},
    ],
)
def test_it_leaves_what_it_does_not_compute(library, kind):
    model = attention(**({"H": 2, "N": 32} | kind))
    assert fuse_attention(model, library) == 0
    assert "ScaledDotProductAttention" in [node.get_type_name() for node in model.get_ordered_ops()]


def test_large_scores_give_no_nan(library):
    model, arrays = attention(1, 32), numbers(1, 40, 32)
    arrays[0] *= 1e4
    assert fuse_attention(model, library) == 1
    found = run(model, arrays, library)
    assert np.isfinite(found).all() and np.abs(found).max() <= np.abs(arrays[2]).max() * 1.01


def test_a_text_has_the_same_bits_in_any_batch_with_any_padding_on_any_number_of_threads(library):
    arrays = numbers(2, 45, 96)
    alone = [array[:1] for array in arrays]
    longer = [np.concatenate([array, array[:, :20]], axis=1) for array in arrays]
    longer[3][:, 45:] = 0
    model = attention(3, 32)
    assert fuse_attention(model, library) == 1
    found = run(model, arrays, library)
    np.testing.assert_array_equal(run(model, alone, library), found[:1])
    np.testing.assert_array_equal(run(model, longer, library)[:, :45], found)
    np.testing.assert_array_equal(run(model, arrays, library, threads=2), found)


@pytest.fixture(scope="module")
def tiny(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a tiny mixture whose heads are wide enough."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher = make_tiny_bert(folder / "teacher", hidden_size=64)
    model, tokenizer = load_dense(str(teacher))
    student, spec = carve(teacher)
    write_manifest(folder, export_model(student, model, tokenizer, spec, folder, plans=tuple(FILES)))
    return folder


def test_an_export_takes_it_where_it_is_built(tiny, monkeypatch):
    ids = np.random.default_rng(0).integers(5, 60, (3, 24))
    keep = (np.arange(24) < np.array([[24], [9], [1]])).astype(np.int64)

    def opened(plan: str) -> Any:
        [graph] = open_graphs([tiny / f"onnx/{FILES[plan]}.onnx"], plan, threads=1)
        return graph

    def embedded(graph: Any) -> np.ndarray:
        inputs = {name: {"input_ids": ids, "attention_mask": keep}.get(name, 0 * ids) for name in graph.inputs}
        [found] = graph.run(["sentence_embedding"], inputs)
        return np.asarray(found)

    for plan in FILES:
        graph = opened(plan)
        assert [node.get_type_name() for node in graph._model.get_ordered_ops()].count("SelfAttention") == 2
        fused = embedded(graph)
        graph.fix([(3, 24)])
        with monkeypatch.context() as without:
            without.setattr("ffn2moe.runtime.engines.openvino.fuse_attention", lambda model, library: 0)
            plain = embedded(opened(plan))
        for other in (embedded(graph), plain):  # all in bfloat16
            assert (fused * other).sum(1).min() > 0.999


def test_the_benchmark_times_both_ways(tiny, tmp_path, capsys):
    texts, page = tmp_path / "texts.txt", tmp_path / "attention.md"
    texts.write_text("\n".join(make_texts(20)))
    common = [str(tiny), "--texts", str(texts), "--shapes", "1x8", "2x16", "--rounds", "5"]
    assert benchmark.main([*common, "--plans", "ov-dense", "ov-native", "--out", str(page)]) == 0
    lines = [line for line in page.read_text().splitlines() if line.startswith("| 2 x 16")]
    assert len(lines) == 2 and "| 1.00x (1.00 to 1.00) |" in lines[0]
    assert benchmark.main([*common, "--plans", "dense"]) == 2
    assert "dense runs in onnxruntime: name plans of OpenVINO with --plans" in capsys.readouterr().err


def test_another_path_of_the_processor_has_none(library):
    code = (
        "from pathlib import Path; import openvino\n"
        "from ffn2moe.runtime.engines._openvino_attention import has_attention\n"
        f"print(has_attention(Path({str(library)!r})))"
    )
    for path, told in (("amx", "True"), ("avx512", "False"), ("no path", "False")):
        environment = {**os.environ, "FFN2MOE_NATIVE": path}
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert ended.stdout.strip() == told, ended.stderr


def test_a_library_of_an_earlier_version_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(_openvino_attention.ctypes, "CDLL", lambda path: object())
    assert not has_attention.__wrapped__(tmp_path / "old.so")
