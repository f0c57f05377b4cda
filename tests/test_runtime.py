"""An export opens, answers as the checkpoint does, and refuses to work when it is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import ffn2moe
from ffn2moe.data.encode import encode
from ffn2moe.planning.measure import Setting, measure
from ffn2moe.planning.timing import Race, Timing
from ffn2moe.runtime import batching, microsoft, quantise
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime.plans import plans_of
from ffn2moe.runtime.workload import parse_workload
from tests.texts import make_texts

TEXTS = [*make_texts(30), "a"]


@pytest.fixture
def export(exported) -> Path:
    return exported / "models/exported"


@pytest.fixture
def copy(export, tmp_path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


@pytest.mark.parametrize("plan", ["fused", "sorted"])
def test_an_export_answers_as_its_checkpoint_does(export, plan):
    model = ffn2moe.load(export / "checkpoint")
    expected = encode(model, AutoTokenizer.from_pretrained(export / "tokenizer"), TEXTS, max_length=32).numpy()
    found = ffn2moe.open_export(export, plan).encode(TEXTS)
    assert found.shape == (len(TEXTS), 32) and found.dtype == np.float32
    np.testing.assert_allclose((found * expected).sum(1), 1, atol=1e-3 if plan == "fused" else 1e-5)


@pytest.mark.parametrize("plan", plans_of("embedding"))
def test_embeddings_have_unit_length_and_the_order_of_the_texts(export, plan):
    opened = runtime.open_export(export, plan, threads=1)
    found = opened.encode(TEXTS, batch_tokens=100)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    alone = np.concatenate([opened.encode([text]) for text in TEXTS[:5]])
    assert ((found[:5] @ alone.T).argmax(1) == np.arange(5)).all()


def test_no_text_gives_no_embedding_and_an_empty_one_is_refused(export):
    opened = runtime.open_export(export)
    assert opened.encode([]).shape == (0, 32)
    with pytest.raises(ValueError, match="text 1 is empty"):
        opened.encode(["a word", "  "])
    with pytest.raises(ValueError, match=r"encode\(\[text\]\)"):
        opened.encode("a word")


def test_any_iterable_of_texts_is_read_once(export):
    opened = runtime.open_export(export)
    np.testing.assert_array_equal(opened.encode(text for text in TEXTS[:3]), opened.encode(TEXTS[:3]))


def test_a_stream_of_texts_is_read_as_its_embeddings_are_taken(export, monkeypatch):
    monkeypatch.setattr(batching, "TEXTS_AT_ONCE", 2)
    opened, read = runtime.open_export(export, "sorted", threads=1), []

    def texts():
        for text in TEXTS[:5]:
            read.append(text)
            yield text

    stream = opened.stream(texts())
    assert next(stream).shape == (2, 32) and len(read) == 2
    assert [len(part) for part in stream] == [2, 1]
    np.testing.assert_allclose(opened.encode(texts()), opened.encode(TEXTS[:5]), atol=1e-6)
    with pytest.raises(ValueError, match="text 3 is empty"):
        list(opened.stream([*TEXTS[:3], " "]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "text 1 is no string but NoneType"),
        (b"a word", "text 1 is no string but bytes"),
        (float("nan"), "text 1 is no string but float"),
        ("a \ud83d word", "text 1 is not valid Unicode: character 2 is half of a surrogate pair"),
    ],
)
def test_what_is_no_text_is_named_with_its_place(export, text, message):
    with pytest.raises(ValueError, match=message):
        runtime.open_export(export).encode(["a word", text])


def test_long_texts_are_cut_to_the_exports_length(export):
    opened = runtime.open_export(export)
    assert len(opened.token_ids(["word " * 500])[0]) == 32
    assert opened.encode(["word " * 500]).shape == (1, 32)


def _cost(batches: list[list[int]], lengths: list[int], call_tokens: int) -> int:
    return sum(call_tokens + len(batch) * max(lengths[index] for index in batch) for batch in batches)


def test_batches_hold_every_text_once_and_no_more_tokens_than_allowed():
    lengths = [3, 9, 5, 40, 1, 8, 2, 0]
    batches = batching.batches_by_length([[1] * length for length in lengths], 20)
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    assert batches[0] == [3]  # longer than a batch may be, so alone
    assert all(len(batch) * max(lengths[index] for index in batch) <= 20 for batch in batches[1:])
    assert batching.batches_by_length([], 20) == []


@pytest.mark.parametrize("call_tokens", [0, 5, 24, 1000])
def test_no_other_batches_of_sorted_texts_cost_less(call_tokens):
    lengths = [31, 30, 12, 12, 11, 9, 3, 3, 2, 1]
    found = batching.batches_by_length([[1] * length for length in lengths], 64, call_tokens)
    every = []
    for cuts in range(2 ** (len(lengths) - 1)):  # each way to cut the sorted texts
        batches = [[0]]
        for index in range(1, len(lengths)):
            if cuts >> (index - 1) & 1:
                batches.append([])
            batches[-1].append(index)
        if all(len(batch) * lengths[batch[0]] <= 64 for batch in batches):
            every.append(_cost(batches, lengths, call_tokens))
    assert _cost(found, lengths, call_tokens) == min(every)


def test_windows_bound_the_texts_and_the_characters_that_are_tokenised_together(monkeypatch):
    monkeypatch.setattr(batching, "TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(batching, "CHARACTERS_AT_ONCE", 10)
    texts = ["a", "b", "c", "d", "long " * 20, "e", None, "f"]
    found = list(batching.windows(iter(texts)))
    assert found == [["a", "b", "c"], ["d", "long " * 20], ["e", None, "f"]]
    assert list(batching.windows([])) == []


@pytest.mark.parametrize("plan", ["dense", "sorted", "sorted8"])
def test_sorted_batches_give_the_embeddings_of_texts_in_their_order(export, plan):
    """The other way has one batch in the order of the texts, all padded to the longest."""
    opened = runtime.open_export(export, plan, threads=1)
    texts = [*make_texts(40), "a", "word " * 10_000]
    expected = opened.run(*opened.batch(texts))[1]
    found = opened.encode(texts)
    cosine_N = (found * expected).sum(1)
    if plan == "sorted8":  # a batch has one scale of the activations
        assert cosine_N.min() > 0.99 and cosine_N.mean() > 0.998
    else:
        np.testing.assert_allclose(cosine_N, 1, atol=1e-5)


def test_the_measured_plan_is_the_default_and_sorted_where_none_was(copy):
    assert runtime.open_export(copy).plan == "sorted"
    (copy / "plan.json").write_text(json.dumps({"default_plan": "dense8", "timings": {}}))
    assert runtime.open_export(copy).plan == "dense8"
    assert runtime.open_export(copy, "fused").plan == "fused"


def test_a_damaged_graph_is_refused(copy):
    graph = copy / "onnx/sorted.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ValueError, match=r"sorted\.onnx is damaged .*copy the folder again"):
        runtime.open_export(copy, "sorted")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda p: shutil.rmtree(p), FileNotFoundError, "is not an export"),
        (lambda p: (p / "manifest.json").write_text("{"), ValueError, "is not valid JSON"),
        (lambda p: (p / "manifest.json").write_text("{}"), ValueError, "lacks plans, spec"),
        (lambda p: (p / "onnx/sorted.onnx").unlink(), FileNotFoundError, "is missing"),
        (lambda p: shutil.rmtree(p / "tokenizer"), FileNotFoundError, "is missing"),
        (lambda p: (p / "plan.json").write_text("[]"), ValueError, "lacks default_plan"),
    ],
)
def test_a_broken_export_is_one_clear_error(copy, damage, error, message):
    damage(copy)
    with pytest.raises(error, match=message):
        runtime.open_export(copy)


def test_an_unknown_plan_or_provider_names_those_there_are(export):
    with pytest.raises(ValueError, match="no plan 'quick'; it has: dense, dense8, fused, sorted, sorted8"):
        runtime.open_export(export, "quick")
    with pytest.raises(ValueError, match=r"'Abacus' is not in this onnxruntime; it has: .*CPUExecutionProvider"):
        runtime.open_export(export, providers=["Abacus"])


def test_a_provider_that_cannot_start_is_one_clear_error_and_no_noise(export, capfd):
    import onnxruntime

    cuda = "CUDAExecutionProvider"
    if cuda not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for the CPU alone")
    try:
        runtime.open_export(export, providers=[cuda])
    except ValueError as error:
        assert "does not start on this machine" in str(error)
    else:
        pytest.skip("there is a GPU here")
    assert "onnxruntime" not in capfd.readouterr().err


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_this_runtimes_moe_op_passes_its_self_test(activation):
    assert microsoft.self_test(activation) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("relu", False), ("silu", False), ("silu", True)])
def test_this_runtimes_quantised_moe_op_passes_its_self_test(activation, gated, bits):
    assert microsoft.self_test(activation, gated=gated, bits=bits) < (0.05 if bits == 8 else 1e-3)


def test_the_moe_op_passes_its_self_test_for_gated_ffns():
    assert microsoft.self_test("silu", gated=True) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_blocks_come_back_as_near_as_their_bits_allow(bits):
    weight = np.random.default_rng(0).standard_normal((3, 5, 2 * quantise.BLOCK)).astype(np.float32)
    weight[1, 2] = 0
    packed, scales = quantise.quantize_blocks(weight, bits)
    assert packed.shape == (3, 5, 2 * quantise.BLOCK * bits // 8) and scales.shape == (3, 5, 2)
    back = quantise.dequantize_blocks(packed, scales, bits)
    error = np.linalg.norm(back - weight) / np.linalg.norm(weight)
    assert error < {8: 0.006, 4: 0.09}[bits], "plain rounding to the largest weight has more than 0.1 with 4 bits"
    assert (back[1, 2] == 0).all()


def test_a_moe_op_that_computes_something_else_fails_the_self_test(monkeypatch):
    right = microsoft._moe_graph
    monkeypatch.setattr(microsoft, "_moe_graph", lambda *given: right(*given[:-1], 1.01 * given[-1]))
    with pytest.raises(RuntimeError, match="computes something else"):
        microsoft.self_test("gelu")
    monkeypatch.setattr(microsoft, "_moe_graph", lambda *given: right(*given[:-1], 1.2 * given[-1]))
    for bits in (8, 4):
        with pytest.raises(RuntimeError, match="QMoE of this onnxruntime computes something else"):
            microsoft.self_test("silu", gated=True, bits=bits)
    monkeypatch.setattr(microsoft, "_moe_graph", lambda *_: b"not a model")
    with pytest.raises(RuntimeError, match="cannot run com"):
        microsoft.self_test("gelu")


def test_opening_an_export_needs_no_torch(export):
    script = (
        "import sys, ffn2moe\n"
        f"ffn2moe.open_export({str(export)!r}, 'fused').encode(['a word'])\n"
        "assert not {'torch', 'transformers', 'onnx_ir'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


# --- timing ---------------------------------------------------------------------------------------------------------


def test_every_plan_of_the_race_is_timed_at_every_shape_against_the_dense_ones(export):
    kept = dict.fromkeys(plans_of("embedding"), True)
    setting = Setting(export, parse_workload("1x4,3x8"), [1], kept)
    found: list[list[Timing]] = []
    measured = measure(setting, TEXTS, rounds=3, report=found.append)
    assert [(rows[0].batch, rows[0].sequence) for rows in found] == [(1, 4), (3, 8)] and not measured.left_out
    for rows in found:
        assert [row.plan for row in rows] == [plan for plan in kept if plan != "fused"]
        assert all(row.median_ms > 0 and row.speedup_vs_dense > 0 for row in rows)
        dense = rows[0]
        assert dense.speedup_vs_dense == 1
        assert min(row.speedup_vs_best_dense for row in rows[:2]) <= 1 <= max(r.speedup_vs_best_dense for r in rows[:2])
    named = measure(setting, TEXTS, plans=("dense", "fused"), rounds=3)
    assert {row.plan for row in named.timings} == {"dense", "fused"}
    with pytest.raises(ValueError, match="no text"):
        measure(setting, [" "])


def test_the_plans_take_turns_so_that_a_slow_moment_hits_all_of_them(monkeypatch):
    order: list[str] = []

    class Recorder:
        def __init__(self, plan: str) -> None:
            self.plan = plan

        def run(self, ids: np.ndarray, mask: np.ndarray) -> None:
            order.append(self.plan)

    monkeypatch.setattr("ffn2moe.planning.timing.SHORTEST_SAMPLE", 0)  # one call a sample
    batch = (np.ones((1, 2)), np.ones((1, 2)))
    race = Race({"dense": Recorder("dense"), "sorted": Recorder("sorted")}, [batch], threads=1)
    for _ in range(20):
        race.round()
    rounds = [tuple(order[at : at + 2]) for at in range(len(order) - 40, len(order), 2)]
    assert set(rounds) == {("dense", "sorted"), ("sorted", "dense")}
