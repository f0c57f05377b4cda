"""Models that generate, classify or give hidden states leave PyTorch as graphs that compute the same, in every plan."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import ffn2moe
from ffn2moe import cli
from ffn2moe.dense.load import load_dense
from ffn2moe.dense.locate import read_ffn
from ffn2moe.dense.sentence import attach
from ffn2moe.moe.describe import spec_of
from ffn2moe.moe.experts import neurons_by_expert, slice_experts
from ffn2moe.moe.install import install_moe
from ffn2moe.moe.layer import MoEFFN
from ffn2moe.onnx import decoder as onnx_decoder
from ffn2moe.onnx import lower as onnx_plans
from ffn2moe.onnx.parity import parity, random_samples, reference
from ffn2moe.onnx.write import export_model, write_manifest
from ffn2moe.runtime import batching, decoders, files, microsoft
from ffn2moe.runtime import export as runtime
from ffn2moe.runtime.engines.onnxruntime import OnnxRuntimeGraph, session
from ffn2moe.runtime.plans import PLANS, plans_of
from ffn2moe.sentence import SentenceModules
from ffn2moe.spec import Gate, Head, MoESpec
from tests.conftest import make_tokenizer

VOCABULARY = 192  # of the tiny tokenizer, about
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 160,
}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
GROUPED = SIZES | TOKENS | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 6}
LANGUAGE_MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=160, activation_function="relu", **TOKENS
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES, **TOKENS, hidden_act="relu"),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        ffn_dim=44,
        max_position_embeddings=160,
        **TOKENS,
    ),
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(
        **WINDOWED, layer_types=["sliding_attention", "full_attention"], attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**WINDOWED, layer_types=["sliding_attention", "full_attention"]),
    "phi3": lambda: tf.Phi3Config(**GROUPED),
}


def carve(
    model: Any, head: Head, *, gate: Gate = "unit", shared_width: int = 0, num_active: int = 2
) -> tuple[Any, MoESpec]:
    """The model with its FFNs cut into four experts that a random router chooses from, and the spec of that."""
    E = 4
    spec = spec_of(
        model,
        head=head,
        num_experts=E,
        num_active=num_active,
        partition="contiguous",
        teacher="tiny",
        max_length=40,
        shared_width=shared_width,
        gate=gate,
        sentence=SentenceModules() if head == "embedding" else None,
    )
    generator = torch.Generator().manual_seed(1)
    layers = []
    for index in range(spec.num_layers):
        shape = spec.shape_of(index)
        routed = shape.ffn_width - shared_width
        expert_of_neuron_F = torch.full((shape.ffn_width,), -1)
        expert_of_neuron_F[shared_width:] = torch.arange(routed) * E // routed
        neurons_EM = neurons_by_expert(expert_of_neuron_F, E)
        shared_S = torch.arange(shared_width) if shared_width else None
        weights = slice_experts(read_ffn(model, index), neurons_EM, shared_S)
        moe = MoEFFN.from_experts(spec, weights, neurons_EM, index, shared_S)
        with torch.no_grad():
            moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator))
            moe.router.balance_bias.copy_(torch.linspace(-0.1, 0.1, E))
            moe.output_scale.mul_(1.25)
        layers.append(moe)
    install_moe(model, layers)
    return model.eval(), spec


def random_model(make: Callable[[], Any], seed: int = 0, scale: float = 3.0) -> Any:
    """A model whose weights and biases are large enough to be told apart."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            elif "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.1)
    return model


def language_model(family: str) -> Any:
    return random_model(lambda: tf.AutoModelForCausalLM.from_config(LANGUAGE_MODELS[family]()))


def opened(graphs: dict[str, Any], kind: type = decoders.CausalExport) -> Any:
    """An export of graphs in memory, without a tokenizer."""
    import onnx_ir as ir

    sessions = [
        OnnxRuntimeGraph(session(ir.to_proto(graph).SerializeToString(), threads=1)) for graph in graphs.values()
    ]

    class Nothing:
        def token_to_id(self, _: str) -> None: ...

    model = {"positions": None, "eos_token_ids": [], "bos_token_id": 2, "decoder_start_token_id": 0}
    return kind(Path("nowhere"), "sorted", {"model": model}, sessions, Nothing())


def lowered(graphs: dict[str, Any], plan: Any) -> dict[str, Any]:
    return {part: onnx_plans.lower(graph, plan) for part, graph in graphs.items()}


def check(model: Any, spec: MoESpec, plans: tuple[str, ...], tolerance: float = 1e-5) -> None:
    """Each plan equals PyTorch on random samples, padded and of all lengths."""
    kinds: dict[str, type] = {"causal": decoders.CausalExport, "seq2seq": decoders.Seq2SeqExport}
    graphs = onnx_decoder.canonical_graphs(model, spec.head)
    known = reference(model, random_samples(model, spec, 12), spec.head)
    for plan in plans:
        export = opened(lowered(graphs, plan), kinds.get(spec.head, runtime.ModelExport))
        found = parity(export.outputs, known)
        assert found.rows >= 6
        assert found.gaps[found.widest].share < tolerance, (plan, found)


# --- language models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(LANGUAGE_MODELS))
def test_every_language_model_decodes_as_pytorch_does(family):
    model, spec = carve(language_model(family), "causal")
    check(model, spec, ("sorted",) if family.startswith("gemma") else ("sorted", "fused"))


@pytest.mark.parametrize("gate", ["softmax", "softmax_topk", "sigmoid"])
def test_every_gate_and_a_shared_expert_are_exported(gate):
    model, spec = carve(language_model("llama"), "causal", gate=gate, shared_width=8)
    check(model, spec, ("sorted", "fused"))


@pytest.mark.parametrize("gate", ["unit", "softmax_topk", "softmax"])
def test_a_shared_expert_beside_one_chosen_expert_is_exported(gate):
    model, spec = carve(language_model("llama"), "causal", gate=gate, shared_width=8, num_active=1)
    check(model, spec, ("sorted", "fused"))
    graph = lowered(onnx_decoder.canonical_graphs(model, "causal"), "fused")["main"].graph
    products = [node for node in graph if node.op_type in ("Gemm", "MatMul") and "router" not in (node.name or "")]
    assert len(products) == (4 + 1 if gate != "softmax" else 4 + 1 + 3), "attention, logits, and an expert of its own"


@pytest.mark.parametrize("num_active", [1, 3, 4])
def test_any_number_of_weighed_experts_is_exported(num_active):
    model, spec = carve(language_model("llama"), "causal", gate="sigmoid", num_active=num_active)
    check(model, spec, ("sorted", "fused"))


def test_a_dense_language_model_is_exported():
    teacher = language_model("qwen3")
    _, spec = carve(copy.deepcopy(teacher), "causal")
    check(teacher, spec, ("dense",))


def test_what_no_operator_computes_is_refused_with_the_reason_and_the_plan_that_does():
    graphs = onnx_decoder.canonical_graphs(carve(language_model("gemma3"), "causal")[0], "causal")
    for plan in ("fused", "qmoe8", "qmoe4"):
        with pytest.raises(onnx_plans.PlanRefused, match="has no gated FFN with gelu_tanh, only with silu; the plan"):
            onnx_plans.lower(graphs["main"], plan)


def test_positions_that_change_as_a_text_grows_are_refused():
    config = LANGUAGE_MODELS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="rope_type 'dynamic' cannot be one ONNX graph"):
        onnx_decoder.canonical_graphs(model, "causal")


def test_exporting_leaves_a_language_model_as_it_was():
    model, _ = carve(language_model("llama"), "causal")
    before = {name: id(module) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    onnx_decoder.canonical_graphs(model.train(), "causal")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.training and model.config._attn_implementation == attention


# --- a whole export of a language model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return tf.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, MoESpec]:
    """A dense language model, the mixture made of it, and its spec."""
    teacher = language_model("llama")
    return teacher, *carve(copy.deepcopy(teacher), "causal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, models) -> Path:
    teacher, student, spec = models
    path = tmp_path_factory.mktemp("causal") / "export"
    write_manifest(path, export_model(student, teacher, tokenizer, spec, path, engines=("onnxruntime",)))
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def export(folder) -> decoders.CausalExport:
    return runtime.open_export(folder, "sorted", threads=1)


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """PyTorch's tokens, one after the other through its cache, and the logits that they were taken from."""
    tokens, rows = [], []
    found = model(torch.tensor([ids]), use_cache=True)
    for _ in range(count):
        rows.append(found.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        found = model(torch.tensor([[tokens[-1]]]), past_key_values=found.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def check_decoding(model: Any, export: decoders.CausalExport, prompts: list[list[int]], count: int) -> float:
    """Largest difference of the logits over `count` tokens of a batch, each row against PyTorch alone."""
    expected = [greedy(model, prompt, count) for prompt in prompts]
    steps = list(export.generate_tokens(prompts, max_new_tokens=count, stop_at_end=False))
    tokens_BN = np.stack(steps, axis=1)
    for row, (tokens, _) in enumerate(expected):
        assert tokens_BN[row].tolist() == tokens
    ids_BL, mask_BL = batching.pad(
        [prompt + tokens for prompt, (tokens, _) in zip(prompts, expected, strict=True)], 0, left=True
    )
    begin = max(map(len, prompts))
    logits_BLV = export.run(ids_BL, mask_BL, range(begin, ids_BL.shape[1]))[:, begin - 1 : -1]
    return max(float(np.abs(logits_BLV[row] - rows).max()) for row, (_, rows) in enumerate(expected))


PROMPTS = {1: [[2, 40, 41, 42]], 3: [[2, 40, 41, 42], [2, 60], [2, 70, 71, 72, 73, 74, 75, 76]]}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", ["fused", "sorted"])
def test_64_tokens_are_pytorchs_in_batches_of_prompts_of_any_length(folder, models, plan, batch):
    assert check_decoding(models[1], runtime.open_export(folder, plan, threads=1), PROMPTS[batch], 64) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_64_tokens_of_the_dense_plan_are_the_teachers(folder, models, batch):
    assert check_decoding(models[0], runtime.open_export(folder, "dense", threads=1), PROMPTS[batch], 64) < 1e-4


@pytest.mark.parametrize("batch", [1, 3])
def test_64_tokens_of_a_real_llama_are_pytorchs(tmp_path, batch):
    data = os.environ.get("FFN2MOE_DATA")
    if not data or not Path(data, "stories260k").is_dir():
        pytest.skip("set FFN2MOE_DATA to the folder that holds stories260k to try a real model")
    model, spec = carve(load_dense(str(Path(data, "stories260k")))[0], "causal", num_active=3)
    _, tokenizer = load_dense(str(Path(data, "stories260k")))
    write_manifest(tmp_path, export_model(model, None, tokenizer, spec, tmp_path, plans=("fused", "sorted")))
    texts = ["Once upon a time", "Tom and his mom", "The dog ran to the big red barn because"][:batch]
    for plan in ("fused", "sorted"):
        export = runtime.open_export(tmp_path, plan, threads=1)
        assert check_decoding(model, export, [export.token_ids(text) for text in texts], 64) < 1e-4


def test_the_manifest_tells_the_files_and_the_parity_of_every_plan(folder):
    manifest = files.read_manifest(folder)
    assert set(manifest["plans"]) == set(plans_of("causal")) and not manifest["refused"]
    for plan, entry in manifest["plans"].items():
        assert entry["sha256"] == files.sha256(folder / entry["file"])
        if not PLANS[plan].is_quantised:
            assert entry["parity"]["logits"] <= 1e-4
        else:
            assert entry["agreement"] > 0.7
    numbers = {"positions": 160, "vocabulary": 192, "bos_token_id": 2, "eos_token_ids": [3]}
    assert manifest["model"] == {"reads": "text", "chats": False} | numbers


def test_every_plan_generates(folder):
    for plan in plans_of("causal"):
        pieces = list(runtime.open_export(folder, plan, threads=1).generate("the red house", max_new_tokens=5))
        assert all(isinstance(piece, str) for piece in pieces), plan


def test_fewer_bits_are_smaller_files(folder):
    size = {plan: (folder / f"onnx/{plan}.onnx").stat().st_size for plan in plans_of("causal")}
    assert size["qmoe4"] < size["qmoe8"] < size["fused"] and size["dense4"] < size["dense8"] < size["dense"]


@pytest.mark.parametrize("family", list(LANGUAGE_MODELS))
def test_a_prompt_has_logits_for_its_last_token_alone(family):
    graphs = onnx_decoder.canonical_graphs(language_model(family), "causal")
    export = opened(lowered(graphs, "dense"))
    ids_BL = np.array([[2, 40, 41, 42, 43], [2, 50, 51, 52, 53]])
    mask = {"attention_mask": np.ones_like(ids_BL)}
    whole_BLV = export._step(ids_BL, export._empty_cache(2), mask)
    last_B1V = export._step(ids_BL, export._empty_cache(2), mask, decoders.LAST)
    assert whole_BLV.shape == (2, 5, VOCABULARY) and last_B1V.shape == (2, 1, VOCABULARY)
    np.testing.assert_allclose(last_B1V, whole_BLV[:, -1:], atol=1e-5)


def test_a_text_comes_in_pieces_that_are_the_decoded_tokens(export, tokenizer):
    ids = export.token_ids("the red house")
    tokens = [int(step[0]) for step in export.generate_tokens([ids], max_new_tokens=20, stop_at_end=False)]
    text = "".join(export.generate("the red house", max_new_tokens=20, stop_at_end=False))
    whole = tokenizer.decode(ids + tokens, skip_special_tokens=True)
    assert (tokenizer.decode(ids, skip_special_tokens=True) + text).split() == whole.split()


def test_what_is_drawn_depends_on_the_seed_alone(export):
    def drawn(**options: Any) -> list[int]:
        steps = export.generate_tokens([[2, 40]], max_new_tokens=12, stop_at_end=False, **options)
        return [int(step[0]) for step in steps]

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=1.0, top_p=1e-9, seed=1) == drawn() == drawn(temperature=1e-6, seed=5)


def test_a_text_ends_with_its_end_token_while_others_go_on(export, monkeypatch):
    steps = np.stack(list(export.generate_tokens(PROMPTS[3], max_new_tokens=20, stop_at_end=False)), axis=1)
    end = int(steps[0, 4])
    monkeypatch.setitem(export._model, "eos_token_ids", [end])
    found = np.stack(list(export.generate_tokens(PROMPTS[3], max_new_tokens=20)), axis=1)
    for row in range(3):
        known = steps[row].tolist()
        length = known.index(end) if end in known else found.shape[1]
        assert found[row, :length].tolist() == known[:length]
        assert (found[row, length:] == -1).all()


def test_a_long_prompt_is_read_in_parts(export, monkeypatch):
    expected = export.logits(list(range(2, 50)))
    monkeypatch.setattr(decoders, "PREFILL_TOKENS", 7)
    np.testing.assert_allclose(export.logits(list(range(2, 50))), expected, atol=1e-5)
    tokens = [int(step[0]) for step in export.generate_tokens([list(range(2, 50))], max_new_tokens=1)]
    assert tokens == [int(expected[-1].argmax())] or tokens == [-1]


def test_a_score_is_the_text_s_surprise(export, models):
    ids = [2, 40, 41, 42, 43, 50]
    with torch.no_grad():
        loss = float(models[1](torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    nats, tokens = export.score(ids)
    assert tokens == 5 and nats / tokens == pytest.approx(loss, abs=1e-5)
    text = "the red house"
    both = export.score(export.token_ids(text))
    assert export.perplexity([text]) == pytest.approx(np.exp(both[0] / both[1]))


def test_a_context_longer_than_the_models_is_refused_with_the_limit(export):
    with pytest.raises(ValueError, match=r"has 161 tokens, but this model can hold 160: shorten it"):
        next(export.generate([5] * 160))
    with pytest.raises(ValueError, match=r"the prompt has 170 tokens, but this model can hold 160"):
        export.logits([5] * 170)
    assert len(list(export.generate_tokens([[5] * 158], max_new_tokens=50, stop_at_end=False))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature = -1 must be"),
        ({"temperature": float("nan")}, "temperature = nan must be"),
        ({"top_p": 0}, "top_p = 0 must be"),
        ({"top_p": 1.5}, "top_p = 1.5 must be"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0 must be"),
    ],
)
def test_parameters_out_of_range_are_refused(export, options, message):
    with pytest.raises(ValueError, match=message):
        export.generate("the", **options)


@pytest.mark.parametrize(("prompt", "message"), [(None, "NoneType"), (b"a", "bytes"), ("\udc80", "surrogate")])
def test_a_prompt_that_is_no_text_is_refused(export, prompt, message):
    with pytest.raises(ValueError, match=f"the prompt is no.*{message}"):
        export.generate(prompt)


def test_an_empty_prompt_begins_a_text_where_the_model_has_a_token_for_that(export, monkeypatch):
    assert export.token_ids([]) == [2]
    monkeypatch.setitem(export._model, "bos_token_id", None)
    with pytest.raises(ValueError, match="the prompt is empty"):
        export.generate([])
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        export.generate([VOCABULARY])


def test_logits_that_are_not_numbers_end_a_text_with_an_error(export, monkeypatch):
    step = export._step
    monkeypatch.setattr(export, "_step", lambda *given: step(*given) * np.nan)
    with pytest.raises(RuntimeError, match="gave logits that are NaN or infinite"):
        list(export.generate("the"))


def test_an_unknown_plan_names_those_there_are_and_a_refused_one_says_why(copied):
    with pytest.raises(ValueError, match="no plan 'quick'; it has: dense, dense4"):
        runtime.open_export(copied, "quick")
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["plans"]["fused"]
    manifest["refused"] = {"fused": "the operator has no such FFN"}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no plan 'fused': the operator has no such FFN"):
        runtime.open_export(copied, "fused")


def test_a_quantised_operator_that_computes_something_else_is_not_opened(folder, monkeypatch):
    right = microsoft._moe_graph
    monkeypatch.setattr(microsoft, "_moe_graph", lambda *given: right(*given[:-1], 1.2 * given[-1]))
    for plan in ("fused", "qmoe8", "qmoe4"):
        with pytest.raises(RuntimeError, match="computes something else"):
            runtime.open_export(folder, plan)
    assert runtime.open_export(folder, "sorted").plan == "sorted"


def test_generating_needs_no_torch(folder):
    script = (
        "import sys, ffn2moe\n"
        f"list(ffn2moe.open_export({str(folder)!r}, 'qmoe8').generate('a word', max_new_tokens=3))\n"
        "assert not {'torch', 'transformers', 'onnx_ir'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent)


def test_the_same_model_gives_the_same_bytes(folder, models, tokenizer, tmp_path):
    teacher, student, spec = models
    write_manifest(tmp_path, export_model(student, teacher, tokenizer, spec, tmp_path, engines=("onnxruntime",)))
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_weights_beyond_one_file_s_size_lie_beside_it(models, tmp_path, monkeypatch):
    monkeypatch.setattr("ffn2moe.onnx.graph.LARGEST_FILE", 10_000)
    _, student, spec = models
    make_tokenizer(tmp_path / "tokenizer")
    manifest = export_model(student, None, None, spec, tmp_path, plans=("sorted", "qmoe4"))
    write_manifest(tmp_path, manifest)
    assert manifest["plans"]["sorted"]["more"].keys() == {"onnx/sorted.onnx.data"}
    graph, weights = tmp_path / "onnx/sorted.onnx", tmp_path / "onnx/sorted.onnx.data"
    assert graph.stat().st_size < 40_000 < weights.stat().st_size
    assert check_decoding(student, runtime.open_export(tmp_path, "sorted", threads=1), PROMPTS[1], 8) < 1e-5
    assert list(runtime.open_export(tmp_path, "qmoe4").generate("the", max_new_tokens=2, stop_at_end=False))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"sorted\.onnx\.data is damaged"):
        runtime.open_export(tmp_path, "sorted")


# --- the command line -----------------------------------------------------------------------------------------------


def test_generate_writes_the_prompt_and_what_follows(folder, export, capsys):
    arguments = ["generate", str(folder), "the red", "--max-tokens", "6", "--plan", "sorted", "--threads", "1"]
    assert cli.main(arguments) == 0
    expected = "".join(export.generate("the red", max_new_tokens=6))
    assert capsys.readouterr().out == f"the red{expected}\n"
    assert cli.main([*arguments, "--temperature", "1", "--top-p", "0.9", "--seed", "3"]) == 0


def test_info_tells_what_a_language_model_gives(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("text that continues a prompt, up to 160 tokens", "qmoe4", "4 of 11 neurons", "gate unit"):
        assert words in shown, shown
    assert "nDCG" not in shown


def test_verify_passes_on_a_sound_language_model(folder, capsys):
    assert cli.main(["verify", str(folder), "--texts", "6", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok") == 9 + 3 + 1 + 9 and "failed" not in shown, shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "EXPORT", "the " * 200], "but this model can hold 160"),
        (["generate", "EXPORT", "the", "--temperature", "-1"], "temperature = -1.0 must be"),
        (["generate", "EXPORT", "the", "--plan", "quick"], "no plan 'quick'"),
        (["encode", "EXPORT", "the"], "makes no embeddings"),
        (["generate", "nowhere", "the"], "nowhere is not an export"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, capsys, arguments, message):
    assert cli.main([str(folder) if argument == "EXPORT" else argument for argument in arguments]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1 and message in told.err


# --- seq2seq --------------------------------------------------------------------------------------------------------


def t5(*, gated: bool) -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=44,
            num_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu" if gated else "relu",
            decoder_start_token_id=0,
            eos_token_id=3,
            tie_word_embeddings=not gated,
        )
    )


def whisper() -> Any:
    sides = {"layers": 1, "attention_heads": 4, "ffn_dim": 44}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
            activation_function="relu",
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=30,
            decoder_start_token_id=2,
            **TOKENS,
        )
    )


@pytest.mark.parametrize("gated", [False, True])
def test_t5_is_exported_with_its_encoder(gated):
    model, spec = carve(random_model(lambda: t5(gated=gated), scale=1), "seq2seq")
    assert len(spec.stacks) == 2
    check(model, spec, ("sorted",) if gated else ("sorted", "fused"))


def test_whisper_is_exported_with_its_encoder():
    model, spec = carve(random_model(whisper), "seq2seq", gate="softmax_topk")
    check(model, spec, ("sorted", "fused"))


def test_a_seq2seq_export_answers_as_pytorch_does(tmp_path, tokenizer):
    model, spec = carve(random_model(lambda: t5(gated=False), scale=1), "seq2seq")
    manifest = export_model(model, None, tokenizer, spec, tmp_path, plans=("sorted", "qmoe8"))
    write_manifest(tmp_path, manifest)
    assert manifest["plans"]["sorted"]["encoder"] == "onnx/sorted.encoder.onnx"
    texts = ["the red house", "a cat", "the first graph of the garden"]
    source = tokenizer(texts, padding=True, return_tensors="pt")
    expected = model.generate(
        input_ids=source["input_ids"], attention_mask=source["attention_mask"], max_new_tokens=12, do_sample=False
    )[:, 1:].numpy()
    export = ffn2moe.open_export(tmp_path, "sorted", threads=1)
    found = np.stack(list(export.generate_tokens(export.source(texts), max_new_tokens=12)), axis=1)
    for row, known in zip(found, expected, strict=True):
        length = known.tolist().index(3) if 3 in known else len(known)
        assert row[:length].tolist() == known[:length].tolist()
    assert isinstance("".join(export.generate(texts[0], max_new_tokens=5)), str)
    assert cli.main(["verify", str(tmp_path), "--texts", "4", "--threads", "1"]) == 0
    (tmp_path / "onnx/sorted.encoder.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"sorted\.encoder\.onnx is missing"):
        ffn2moe.open_export(tmp_path, "sorted")


# --- models that read all at once -----------------------------------------------------------------------------------

TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 44}
IMAGES = {"image_size": 16, "patch_size": 8}


@pytest.mark.parametrize(
    ("make", "head", "plans"),
    [
        (
            lambda: tf.ViTModel(tf.ViTConfig(**TOWER, **IMAGES, hidden_act="relu"), add_pooling_layer=False),
            "features",
            ("sorted", "fused"),
        ),
        (
            lambda: tf.ViTForImageClassification(tf.ViTConfig(**TOWER, **IMAGES, num_labels=5)),
            "classification",
            ("sorted",),
        ),
        (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**TOWER, **IMAGES)), "features", ("sorted",)),
        (
            lambda: tf.BertForSequenceClassification(
                tf.BertConfig(**TOWER, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3)
            ),
            "classification",
            ("sorted",),
        ),
        (
            lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**GROUPED, num_labels=3)),
            "classification",
            ("sorted", "fused"),
        ),
    ],
    ids=["vit", "vit-classifier", "clip-vision", "bert-classifier", "llama-classifier"],
)
def test_classifiers_and_encoders_of_images_are_exported(make, head, plans):
    model, spec = carve(random_model(make), head)
    check(model, spec, plans, tolerance=2e-5)


def test_a_model_of_two_towers_names_the_class_of_one():
    towers = {"text_config": TOWER | {"vocab_size": VOCABULARY}, "vision_config": TOWER | IMAGES}
    model = tf.CLIPModel(tf.CLIPConfig(**towers))
    with pytest.raises(ValueError, match="by its class CLIPVisionModel"):
        onnx_decoder.canonical_graphs(model, "features")


def test_a_classifier_of_texts_answers_as_pytorch_does(tmp_path, tokenizer):
    config = tf.BertConfig(**TOWER, vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3)
    model, spec = carve(random_model(lambda: tf.BertForSequenceClassification(config)), "classification")
    write_manifest(tmp_path, export_model(model, None, tokenizer, spec, tmp_path))
    texts = ["the red house", "a cat", "the first graph of the garden"]
    with torch.no_grad():
        expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.numpy()
    export = ffn2moe.open_export(tmp_path, "sorted", threads=1)
    np.testing.assert_allclose(export.classify(texts), expected, atol=1e-5)
    with pytest.raises(ValueError, match="text 1 is empty"):
        export.batch(["a", " "])


def test_modernberts_window_is_kept(tmp_path):
    config = tf.ModernBertConfig(
        **TOWER | {"num_hidden_layers": 2},
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        local_attention=8,
        layer_types=["full_attention", "sliding_attention"],
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )
    model, spec = carve(random_model(lambda: tf.ModernBertModel(config)), "embedding")
    attach(model, SentenceModules())
    make_tokenizer(tmp_path / "tokenizer")
    manifest = export_model(model, None, None, replace(spec, max_length=40), tmp_path, plans=("sorted", "fused"))
    assert manifest["plans"]["sorted"]["parity_max_abs"] < 1e-5
    assert "has no gated FFN with gelu" in manifest["refused"]["fused"]
