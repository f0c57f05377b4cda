"""The judges of language models: figures as plain transformers gives them, one answer at a time."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedTokenizerFast,
)

from ffn2moe import cli
from ffn2moe.convert import Settings, convert
from ffn2moe.judges import likelihood
from ffn2moe.judges.answers import Compared, by_group, kept, kept_interval, right
from ffn2moe.judges.asked import Asked, ask, first_token
from ffn2moe.judges.items import TASKS, Item, spread
from ffn2moe.judges.likelihood import log_likelihoods
from ffn2moe.judges.reading import blocks, read
from tests.texts import make_texts

POSITIONS = 64


def make_bpe(folder: Path, *, bos: bool = True, space_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like GPT-2's; with `space_merges` a token may reach over the end of a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not space_merges)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<end>", "<begin>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(make_texts(300), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", **({"bos_token": "<begin>"} if bos else {})
    )
    made.save_pretrained(folder)
    return made


def make_llama(folder: Path, *, seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random LLaMA whose answers differ, with a byte-level tokenizer, as a Hugging Face folder."""
    tokenizer = make_bpe(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), **SMALL, num_key_value_heads=1, intermediate_size=48)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS, "initializer_range": 0.2}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(vocab_size=400, **SMALL, num_key_value_heads=1, intermediate_size=48))


def gemma() -> Gemma3ForCausalLM:
    """Sliding windows shorter than the contexts, and logits that are capped behind the output matrix."""
    sizes = {"head_dim": 16, "sliding_window": 5, "final_logit_softcapping": 3.0, "num_key_value_heads": 1}
    return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=400, **SMALL, **sizes, intermediate_size=48))


def granite() -> GraniteForCausalLM:
    """Logits that are divided behind the output matrix."""
    return GraniteForCausalLM(GraniteConfig(vocab_size=400, **SMALL, logits_scaling=4.0, intermediate_size=48))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, **GPT))


def gpt() -> OpenAIGPTLMHeadModel:
    """A model without a key-value cache."""
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=400, **GPT))


def one_by_one(model, asked: list[Asked]) -> torch.Tensor:
    """The definition: every answer by itself, from the logits of all positions."""
    found = []
    for one in asked:
        ids = torch.tensor([[*one.context, *one.answer]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1]).logits[0, len(one.context) - 1 :].double()
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(one.answer).unsqueeze(1)).sum())
    return torch.stack(found)


def made_up(count: int, choices: int = 4) -> list[Item]:
    """Questions of many lengths; some contexts occur twice."""
    texts = [text.replace("\n", " ") for text in make_texts(count * (choices + 1), seed=3)]
    items = []
    for number in range(count):
        context, *answers = texts[number * (choices + 1) : (number + 1) * (choices + 1)]
        cut = tuple(answer[: 4 + 3 * number % 17 + 5 * place] for place, answer in enumerate(answers))
        items.append(Item(context[: 10 + 7 * (number % 6)], cut, number % choices))
    return items


def short(count: int, seed: int) -> list[str]:
    """Sentences of a few words."""
    return [text.split("\n")[0] for text in make_texts(count, seed=seed)]


@pytest.mark.parametrize("make", [llama, gemma, granite, gpt2, gpt])
@pytest.mark.parametrize("batch_tokens", [16, 1024])
def test_likelihoods_are_those_of_one_answer_at_a_time(tmp_path, monkeypatch, make, batch_tokens):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", batch_tokens)
    torch.manual_seed(1)
    model, tokenizer = make().eval(), make_bpe(tmp_path)
    pairs = [Item(None, (first, second), 0) for first, second in zip(short(6, 0), short(6, 8), strict=True)]
    asked = ask([*made_up(14), *pairs], tokenizer, POSITIONS).asked
    asked += [Asked((5, 6, 7), (8,)), Asked((5, 6, 7), (9,)), Asked((4, 5), (6, 7))]  # of one token, of one answer
    found = log_likelihoods(model, asked)
    torch.testing.assert_close(found, one_by_one(model, asked), atol=1e-5, rtol=0)


def test_only_judged_positions_have_logits(tmp_path):
    seen = []
    model, tokenizer = make_llama(tmp_path)
    model.lm_head.register_forward_hook(lambda head, given, output: seen.append(output.shape[:-1].numel()))
    asked = ask(made_up(9), tokenizer, POSITIONS).asked
    log_likelihoods(model, asked)
    contexts = {one.context for one in asked}
    assert sum(seen) == 1 + len(contexts) + sum(len(one.answer) - 1 for one in asked)  # 1: the look for a cache
    assert not model.lm_head._forward_pre_hooks


def test_a_context_is_read_once_for_all_its_answers(tmp_path):
    seen = []
    model, _ = make_llama(tmp_path)
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: seen.append(output.shape[1]))
    context = tuple(range(10, 40))
    log_likelihoods(model, [Asked(context, (number, 50)) for number in range(60, 70)])
    assert seen == [1, 30, 1]


@pytest.mark.parametrize("space_merges", [False, True])
def test_tokens_that_merge_across_the_border_are_split_as_the_harness_does(tmp_path, space_merges):
    tokenizer = make_bpe(tmp_path, space_merges=space_merges)
    item = Item("return the sum of", ("the values", "the mean"), 0)
    context = tokenizer.encode(item.context, add_special_tokens=False)
    merged = 0
    for one, choice in zip(ask([item], tokenizer, None).asked, item.choices, strict=True):
        whole = tokenizer.encode(f"{item.context} {choice}", add_special_tokens=False)
        assert one == Asked(tuple(context), tuple(whole[len(context) :]))
        merged += whole[: len(context)] != context
    assert merged == (2 if space_merges else 0)


def test_spaces_at_the_end_of_a_context_belong_to_the_answer(tmp_path):
    tokenizer = make_bpe(tmp_path)
    (one, _) = ask([Item("the sum  ", ("of", "is"), 0)], tokenizer, None).asked
    assert tokenizer.decode(one.context) == "the sum" and tokenizer.decode(one.answer) == "   of"


def test_a_context_beyond_the_positions_loses_its_beginning(tmp_path):
    model, tokenizer = make_llama(tmp_path)
    item = Item(" ".join(make_texts(12)), ("a cat", "the red house of the dog"), 0)
    sheet = ask([item, *made_up(2)], tokenizer, POSITIONS)
    assert sheet.cut == 1 and sheet.counts == [2, 4, 4]
    for one in sheet.asked[:2]:
        assert len(one.context) + len(one.answer) == POSITIONS + 1
        assert tokenizer.encode(f"{item.context}")[-9:] == list(one.context[-9:])
    torch.testing.assert_close(log_likelihoods(model, sheet.asked), one_by_one(model, sheet.asked), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"has \d+ tokens, and the model 64 positions: leave the question out"):
        ask([Item("a", ("cat", " ".join(make_texts(12))), 0)], tokenizer, POSITIONS)


def test_the_first_token_is_the_beginning_of_texts_or_else_their_end(tmp_path):
    assert first_token(make_bpe(tmp_path)) == 1
    assert first_token(make_bpe(tmp_path, bos=False)) == 0
    neither = make_bpe(tmp_path, bos=False)
    neither.eos_token = None
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        first_token(neither)


def test_blocks_hold_the_whole_text_and_begin_as_the_tokenizer_begins(tmp_path):
    tokenizer = make_bpe(tmp_path)
    text = "\n".join(make_texts(5))
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = blocks(tokenizer, text, 16)
    assert list(chain(*found)) == ids and {len(block) for block in found[:-1]} == {16}
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<begin> $A", special_tokens=[("<begin>", 1)])
    assert [block[0] for block in blocks(tokenizer, text, 16)] == [1] * -(-len(ids) // 15)
    assert list(chain(*(block[1:] for block in blocks(tokenizer, text, 16)))) == ids
    with pytest.raises(ValueError, match="no block of two tokens"):
        blocks(make_bpe(tmp_path), "a", 16)


def test_a_text_is_read_as_plain_transformers_reads_it(tmp_path):
    teacher, tokenizer = make_llama(tmp_path)
    student, _ = make_llama(tmp_path, seed=1)
    found = blocks(tokenizer, "\n".join(make_texts(5)), 24)
    readings = read({"student": student, "teacher": teacher}, found, teacher="teacher")
    for place, block in enumerate(found):
        ids = torch.tensor([block])
        with torch.no_grad():
            mine, its = (model(input_ids=ids).logits[0, :-1].double() for model in (student, teacher))
        nats = torch.nn.functional.cross_entropy(mine, ids[0, 1:], reduction="sum").item()
        apart = torch.nn.functional.kl_div(
            mine.log_softmax(-1), its.log_softmax(-1), log_target=True, reduction="sum"
        ).item()
        reading = readings["student"]
        assert reading.nats_N[place].item() == pytest.approx(nats, abs=1e-4)
        assert reading.divergence_N[place].item() == pytest.approx(apart, abs=1e-4)
        assert reading.agreed_N[place].item() == (mine.argmax(-1) == its.argmax(-1)).sum().item()
        assert reading.positions_N[place].item() == len(block) - 1
    assert readings["teacher"].divergence_N.abs().max() == 0


def test_ties_are_guesses():
    items = [Item("a", ("b", "c", "d", "e"), 1), Item("a", ("b", "cc"), 0), Item("a", ("b", "cc"), 1)]
    nats = torch.tensor([-2.0, -2.0, -2.0 + 1e-12, -3.0, -3.0, -4.0, -3.0, -6.0], dtype=torch.float64)
    assert right(items, nats, "accuracy").tolist() == pytest.approx([1 / 3, 1, 0])
    assert right(items, nats, "accuracy_normalised").tolist() == pytest.approx([1 / 3, 0, 0.5])


def constant(model):
    """Return the model with logits that are one vector at every position, as the best of such a student has."""
    bias = torch.linspace(0, 1, model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda head, given, output: bias.expand_as(output))
    return model


def test_a_constant_student_is_at_chance_and_keeps_nothing(tmp_path):
    """Answers of the same tokens in another order: what comes before a word is all that tells them apart."""
    teacher, _ = make_llama(tmp_path)
    generator = torch.Generator().manual_seed(0)
    asked, items = [], []
    for number in range(120):
        answer = torch.randint(100, 400, (6,), generator=generator)
        orders = [answer[torch.randperm(6, generator=generator)] for _ in range(4)]
        asked += [Asked((5, 6, 7 + number % 3), tuple(order.tolist())) for order in orders]
        items.append(Item("", ("same", "size", "each", "time"), 0))
    its = log_likelihoods(teacher, asked).view(-1, 4)
    labels = [
        int(its_C.argmax()) if number % 3 else 0 for number, its_C in enumerate(its)
    ]  # a teacher that mostly knows
    items = [Item(item.context, item.choices, label) for item, label in zip(items, labels, strict=True)]
    rights = [
        right(items, log_likelihoods(model, asked), "accuracy_normalised")
        for model in (constant(make_llama(tmp_path)[0]), teacher)
    ]
    both = Compared.of(items, *rights)
    assert both.known and rights[1].mean() > 0.6
    assert rights[0].mean().item() == pytest.approx(0.25) and both.kept() == pytest.approx(0)
    interval = kept_interval([both])
    assert interval.low == pytest.approx(0) and interval.high == pytest.approx(0)
    same = Compared.of(items, rights[1], rights[1])
    assert same.kept() == 1 and kept([both, same]) == pytest.approx(0.5)
    middle = kept_interval([Compared.of(items, right(items, its.flatten().roll(4), "accuracy"), rights[1]), same])
    assert middle.low < kept([Compared.of(items, right(items, its.flatten().roll(4), "accuracy"), rights[1]), same])
    assert middle.high - middle.low > 0.05


def test_a_teacher_at_chance_has_nothing_to_keep():
    items = [Item("a", ("b", "c"), 0)] * 40
    guess = torch.tensor([1.0, 0.0] * 20)
    assert not Compared.of(items, torch.ones(40), guess).known
    assert Compared.of(items, guess, torch.ones(40)).known


def test_kinds_of_questions_are_counted_apart():
    items = [Item(None, ("a", "b"), 0, group) for group in ("x", "y", "x")]
    assert by_group(items, torch.tensor([1.0, 0.0, 0.0])) == {"x": 0.5, "y": 0.0}
    assert by_group([Item("a", ("b", "c"), 0)], torch.tensor([1.0])) == {}


def test_a_sample_is_spread_evenly():
    assert spread(range(10), 3) == [0, 3, 6] and spread(range(3350), 670) == list(range(0, 3350, 5))
    assert spread(range(3), None) == spread(range(3), 9) == [0, 1, 2]


GOOD_ROW = {"context": "the cat", "endings": ["is red", "of the"], "label": 0}
GOOD_PAIR = {"good": "the cat is red", "bad": "cat the is red", "phenomenon": "order", "paradigm": "noun"}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("hellaswag", [GOOD_ROW, {"ctx": "a", "endings": ["b", "c"], "label": 0}], "f.jsonl:2 has no 'context'; its"),
        ("hellaswag", [GOOD_ROW | {"label": 2}], "its label is 2, and must be a number from 0 to 1"),
        ("hellaswag", [GOOD_ROW | {"label": "1"}], "its label is '1', and must be a number"),
        ("hellaswag", [GOOD_ROW | {"endings": ["is red", " "]}], "f.jsonl:1 is no question of HellaSwag: ending 1 is"),
        ("hellaswag", [GOOD_ROW | {"endings": ["is red"]}], "no list of two or more"),
        ("hellaswag", [GOOD_ROW | {"context": ""}], "its context is empty"),
        (
            "hellaswag",
            [],
            "holds no question: give a .jsonl file of HellaSwag, with the columns context",
        ),
        ("blimp", [GOOD_PAIR | {"bad": 3}], "its bad is not text but 3"),
        ("blimp", [GOOD_PAIR | {"bad": GOOD_PAIR["good"]}], "one and the same"),
        ("blimp", [{"sentence_good": "a", "sentence_bad": "b"}], "has no 'good' and no 'bad' and no 'phenomenon'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, task, rows, message):
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        TASKS[task].read(path)
    assert len(TASKS["blimp"].read(write(tmp_path, "good.jsonl", [GOOD_PAIR]))) == 1


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Two models, questions and a text."""
    root = tmp_path_factory.mktemp("judged")
    for name, seed in (("teacher", 0), ("student", 1)):
        make_llama(root / name, seed=seed)
    rows = [{"context": one.context, "endings": list(one.choices), "label": one.label} for one in made_up(30)]
    texts = short(40, 0)
    pairs = [
        {"good": text, "bad": " ".join(reversed(text.split())), "phenomenon": f"kind {number % 2}", "paradigm": "a"}
        for number, text in enumerate(texts)
    ]
    (root / "text.txt").write_text("\n".join(make_texts(20)))
    write(root, "hellaswag.jsonl", rows)
    write(root, "blimp.jsonl", pairs)
    return {name: root / name for name in ("teacher", "student", "hellaswag.jsonl", "blimp.jsonl", "text.txt")}


def judged(files, *arguments: str, capsys) -> dict:
    options = ["--hellaswag", "hellaswag.jsonl", "--blimp", "blimp.jsonl", "--text", "text.txt", "--json"]
    given = [str(files.get(argument, argument)) for argument in ("judge", *arguments, *options)]
    capsys.readouterr()
    assert cli.main(given) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_gives_every_figure(files, capsys):
    found = judged(files, "student", "--teacher", "teacher", capsys=capsys)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(files["student"]).eval(), make_bpe(files["student"])
    for name, figures in (("hellaswag", ("accuracy", "accuracy_normalised")), ("blimp", ("accuracy",))):
        items = TASKS[name].read(files[f"{name}.jsonl"])
        nats = one_by_one(model, ask(items, tokenizer, POSITIONS).asked)
        for figure in figures:
            assert found["tasks"][name]["model"][figure]["value"] == pytest.approx(
                right(items, nats, figure).mean().item()
            )
    assert set(found["tasks"]["blimp"]["model"]["groups"]) == {"kind 0", "kind 1"}
    assert found["tasks"]["hellaswag"]["chance"] == 0.25 and found["tasks"]["blimp"]["chance"] == 0.5
    text = found["text"]
    assert text["divergence"] > 0 and 0 < text["agreement"] < 1
    assert text["kept"] == pytest.approx(text["teacher"]["perplexity"] / text["model"]["perplexity"])


def test_a_model_keeps_all_of_itself(files, capsys):
    found = judged(files, "teacher", "--teacher", "teacher", "--most", "9", capsys=capsys)
    assert found["text"]["divergence"] == 0 and found["text"]["agreement"] == found["text"]["kept"] == 1
    assert found["tasks"]["hellaswag"]["questions"] == found["tasks"]["blimp"]["questions"] == 9
    assert math.isclose(found.get("kept", 1), 1)


def test_the_table_shows_the_figures(files, capsys):
    options = ["--hellaswag", files["hellaswag.jsonl"], "--text", files["text.txt"], "--teacher", files["teacher"]]
    assert cli.main(list(map(str, ["judge", files["student"], *options]))) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("HellaSwag, normalised", "30 questions, chance 25.0 %", "KL from the teacher", "kept (95 % interval)"):
        assert word in shown, word
    assert "…" not in shown, "a figure is cut"


@pytest.mark.parametrize("container", ["mixtral", "qwen2_moe"])
def test_an_export_its_checkpoint_and_its_container_are_one_model(files, tmp_path, capsys, container):
    texts = write(tmp_path, "texts.jsonl", [{"text": text} for text in make_texts(60)])
    settings = Settings(
        num_experts=4, num_active=2, distill_steps=0, onnx=False, corpus=str(texts), max_length=16, container=container
    )
    convert(str(files["teacher"]), tmp_path / "out", settings)
    found = [
        judged(files, str(tmp_path / name), "--teacher", "teacher", capsys=capsys)
        for name in ("out", "out/checkpoint", f"out/{container}")
    ]
    assert found[0]["text"] == found[1]["text"] and found[0]["tasks"] == found[1]["tasks"]
    for key in ("divergence", "agreement", "kept"):
        assert found[0]["text"][key] == pytest.approx(found[2]["text"][key], rel=1e-4)
    assert found[0]["text"]["divergence"] > 1e-3
    for task in ("hellaswag", "blimp"):
        assert found[0]["tasks"][task]["model"]["accuracy"] == found[2]["tasks"][task]["model"]["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["student"], "there is nothing to judge by: name a file of blimp, hellaswag, or a text"),
        (["student", "--hellaswag", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["student", "--text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["student", "--blimp", "hellaswag.jsonl"], "has no 'good' and no 'bad'"),
        (["nowhere", "--text", "text.txt"], "nowhere"),
        (["student", "--text", "text.txt", "--block", "1"], "no block of two tokens"),
    ],
)
def test_what_cannot_be_judged_is_one_line(files, capsys, arguments, message):
    assert cli.main([str(files.get(argument, argument)) for argument in ("judge", *arguments)]) == 2
    assert message in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_too_little_memory_for_logits_is_told_before_a_weight_is_read(files, capsys, monkeypatch):
    monkeypatch.setattr("ffn2moe.judge.available_memory", lambda: 2**20)
    monkeypatch.setattr("ffn2moe.judge.load_dense", lambda *_, **__: pytest.fail("weights were read"))
    assert cli.main(["judge", str(files["student"]), "--text", str(files["text.txt"])]) == 2
    told = capsys.readouterr().err
    assert "for the logits of 64 tokens over a vocabulary of" in told and "lower --block" in told
