"""What `auto` means for a training: by the head and the size of the model, never by the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffn2moe.conversion.settings import Settings
from ffn2moe.conversion.task import request_of
from ffn2moe.distill.usual import (
    FEWEST_STEPS,
    LANGUAGE_MODEL_WORK,
    MOST_STEPS,
    USUAL_STEPS,
    usual_batch_tokens,
    usual_rate,
    usual_steps,
)
from ffn2moe.preflight import case, duration, mixture
from ffn2moe.preflight.case import GENERATED_TEXTS, WRITING_SHARE, Case
from ffn2moe.preflight.duration import estimated
from ffn2moe.preflight.mixture import experts
from ffn2moe.preflight.room import room_of
from ffn2moe.runtime.workload import USUAL_SHAPES
from ffn2moe.spec import MoESpec
from tasks import check
from tasks.params import load_params
from tasks.workload import shapes_of
from tests.conftest import make_tiny_llama
from tests.mixtures import flat_spec
from tests.texts import PARAMS


class Config:
    """What the number of operations reads of a config."""

    num_attention_heads, num_key_value_heads, vocab_size = 9, 3, 49152


def spec_of_size(width: int, layers: int) -> MoESpec:
    shape = {"width": width, "ffn_width": 4 * width, "expert_width": width, "num_layers": layers, "gated": True}
    return flat_spec(num_experts=4, head="causal", max_length=128, activation="silu", **shape)


def test_a_language_model_learns_for_the_same_work_whatever_its_size():
    found = {width: usual_steps(spec_of_size(width, 30), Config(), 4096) for width in (32, 576, 768, 4096)}
    assert found[32] == MOST_STEPS and found[4096] == FEWEST_STEPS
    assert FEWEST_STEPS < found[768] < found[576] < MOST_STEPS
    assert usual_steps(spec_of_size(576, 30), Config(), 1024) == pytest.approx(4 * found[576], rel=0.02)
    assert usual_steps(replace(spec_of_size(576, 30), head="embedding"), Config(), 4096) == USUAL_STEPS
    assert 4096 * found[576] < LANGUAGE_MODEL_WORK / 1e8


def test_a_step_grows_with_the_width_of_a_language_model():
    assert [usual_batch_tokens("causal", width, 128) for width in (64, 576, 8192)] == [512, 1152, 2048]
    assert usual_batch_tokens("embedding", 64, 128) == 4096 and usual_batch_tokens("causal", 64, 5000) == 5000


def test_the_rate_falls_with_the_width():
    assert usual_rate(spec_of_size(64, 2)) == 3e-3
    encoder = replace(spec_of_size(384, 2), head="embedding")
    assert usual_rate(encoder) == 1e-3
    assert usual_rate(encoder, "all") == 3e-4
    assert usual_rate(spec_of_size(1024, 2)) == 5e-4


def test_the_shapes_of_an_encoder_are_no_longer_than_its_texts():
    settings, spec = load_params(PARAMS).benchmark, {"head": "embedding", "max_length": 64}
    assert shapes_of(settings, {"spec": spec}) == ((1, 16), (1, 64), (32, 32), (32, 64))
    assert shapes_of(settings, {"spec": spec | {"max_length": 16}}) == ((1, 16), (32, 16))
    assert shapes_of(settings, {"spec": spec | {"max_length": 512}}) == USUAL_SHAPES


def test_shapes_that_the_model_cannot_read_are_refused_before_the_work(tiny_teacher: Path, llama: Path):
    asked = request_of(str(tiny_teacher), None, Settings(num_experts=4, max_length=16))
    asked = replace(asked, called={**asked.called, "timed": "benchmark.shapes"}, every_plan=True)
    with pytest.raises(ValueError, match=r"benchmark\.shapes: .* texts of 17 tokens, and .* cuts them to 16"):
        list(mixture.plans(Case(replace(asked, timed=((1, 8), (2, 17))))))
    assert list(mixture.plans(Case(replace(asked, timed=((1, 8), (2, 16))))))
    writer = request_of(str(llama), None, Settings(num_experts=4, max_length=16, corpus="generated"))
    writer = replace(writer, called=asked.called, timed=((1, 10**6),), decode_tokens=16)
    with pytest.raises(ValueError, match=r"benchmark\.shapes: .* more than the \d+ that the model can hold"):
        list(mixture.plans(Case(writer)))


def test_the_shapes_of_a_language_model_are_prompts_that_it_can_hold():
    settings = load_params(PARAMS).benchmark
    causal = {"spec": {"head": "causal"}, "model": {"positions": 512}}
    assert shapes_of(settings, {"spec": {"head": "embedding"}}) == USUAL_SHAPES
    assert shapes_of(settings, causal) == ((1, 16), (1, 128), (1, 496))
    assert shapes_of(settings, causal | {"model": {"positions": 64}}) == ((1, 16), (1, 48))
    assert shapes_of(settings, causal | {"model": {}}) == ((1, 16), (1, 128), (1, 512))
    assert shapes_of(load_params(PARAMS, ["benchmark.shapes=[[2, 8]]"]).benchmark, causal) == ((2, 8),)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def case_of(llama: Path, **settings: object) -> Case:
    values: dict[str, object] = {"num_experts": 4, "max_length": 16, "corpus": "generated", **settings}
    return Case(request_of(str(llama), None, Settings(**values)))


def test_the_minutes_that_are_asked_for_bound_the_writing_too(llama: Path):
    ten = case_of(llama, distill_minutes=10)
    assert ten.writing_seconds == pytest.approx(600 * WRITING_SHARE)
    assert ten.training_minutes + ten.writing_seconds / 60 == pytest.approx(10)
    assert ten.most_texts == GENERATED_TEXTS
    found = estimated(ten)
    assert found["texts"] <= 600 * WRITING_SHARE and found["texts"] + found["distilling"] <= 600
    read = case_of(llama, distill_minutes=10, corpus="docstrings")
    assert read.writing_seconds is None and read.training_minutes == 10


def test_a_gated_language_model_keeps_a_half_where_no_number_is_named(llama: Path, tiny_teacher: Path):
    F = case_of(llama).dense.config.intermediate_size

    def found(**settings: object) -> tuple[int, int, str | None]:
        spec = case_of(llama, **{"num_experts": "auto", **settings}).spec
        return spec.num_experts, spec.shared_width, spec.container

    assert found() == (3, F // 4, "granitemoeshared")
    assert found(container="none") == (3, F // 4, None)
    assert found(ffn_width=0.5, container="none") == (3, F // 8, None)
    assert found(container="mixtral") == (4, 0, "mixtral")  # has no shared expert
    assert found(num_experts=8)[:2] == (8, 0) and found(shared_width=8)[:2] == (4, 8)
    for other in ({"num_active": 2}, {"partition": "coactivation"}, {"expert_width": 0.5}):
        assert found(**other)[:2] == (4, 0), other
    for container, recommended in (("auto", True), ("none", False)):  # with widths by need experts are ahead
        told = " ".join(experts(case_of(llama, num_experts="auto", container=container)))
        assert ("--experts 1 --ffn-width 0." in told and "--width-per-layer budget" in told) == recommended
    encoder = Case(request_of(str(tiny_teacher), None, Settings())).spec
    assert (encoder.num_experts, encoder.shared_width) == (4, 0)


def test_a_model_writes_no_more_than_it_learns_from(llama: Path):
    few, more = (case_of(llama, distill_steps=steps, calibration_tokens=1600, batch_tokens=160) for steps in (0, 10))
    assert 100 <= few.most_texts < more.most_texts <= 2.2 * few.most_texts
    assert few.writing_seconds is None and case_of(llama, texts=7).most_texts == 7
    none = case_of(llama, distill_minutes=0, calibration_tokens=1600)
    assert none.most_texts == few.most_texts


def test_a_language_model_is_calibrated_on_more_tokens_unless_a_number_is_given(llama: Path, tiny_teacher: Path):
    encoder = Case(request_of(str(tiny_teacher), None, Settings(num_experts=4)))
    usual, given = case_of(llama), case_of(llama, calibration_tokens=500)
    assert [one.calibration_tokens for one in (encoder, usual, given)] == [16384, 32768, 500]
    assert estimated(usual)["decomposing"] > estimated(given)["decomposing"]


def test_a_student_with_the_teachers_own_layers_is_not_decomposed(llama: Path):
    fewer, narrow, both = (
        case_of(llama, num_experts=1, keep_layers=keep, ffn_width=width)
        for keep, width in ((1, "full"), ("all", 0.5), (1, 0.5))
    )
    assert estimated(fewer)["decomposing"] == 0 < estimated(both)["decomposing"] <= estimated(narrow)["decomposing"]


def test_plans_that_round_are_judged_and_raced_in_the_estimate(tiny_teacher: Path):
    asked = request_of(str(tiny_teacher), None, Settings(num_experts=4))
    asked = replace(asked, every_plan=True, timed=((1, 16),))
    none, few, many = (estimated(Case(replace(asked, rounds=rounds))) for rounds in (0, 3, 30))
    assert none["racing plans"] == 0 < few["racing plans"] < many["racing plans"] < 10 * few["racing plans"]
    assert none["graphs"] < few["graphs"] == pytest.approx(many["graphs"])


def test_the_probe_of_the_speed_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert duration.speed.__wrapped__(32, 64, "cpu")[0] > 0 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_memory_of_the_logits_does_not_grow_with_the_batch(llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ffn2moe.distill.vocabulary.MOST_LOGITS", 2**14)
    small, large, larger = (room_of(case_of(llama, batch_tokens=size)).kept for size in (2**10, 2**11, 2**12))
    assert larger - large == 2 * (large - small)  # the same logits in each
    one = case_of(llama).dense.config.vocab_size
    assert large - small < 2**10 * one * 4 * 8, "less than the logits of the tokens that are more"


def test_a_teacher_of_the_pipeline_writes_what_it_usually_learns_from_at_most():
    written = ["data.corpus=generated", "teacher.max_length=128"]
    for settings, texts in (
        (written, 4096),
        ([*written, "data.max_texts=2000"], 2000),
        (["data.corpus=generated", "teacher.max_length=auto"], 2048),
        (["teacher.max_length=128"], 40000),
    ):
        assert check.request_of(load_params(PARAMS, settings), Path()).texts == texts


def test_a_small_model_writes_its_corpus_and_a_large_one_reads_docstrings(llama: Path, monkeypatch: pytest.MonkeyPatch):
    assert case_of(llama, corpus="auto").corpus == "generated"
    monkeypatch.setattr(case, "LARGEST_WRITER", 0)
    large = case_of(llama, corpus="auto")
    assert large.corpus == "docstrings" and any("--corpus generated" in line for line in mixture.corpus(large))
    monkeypatch.setattr(case, "missing_packages", lambda: ["numpy"])
    assert case_of(llama, corpus="auto").corpus == "generated"
