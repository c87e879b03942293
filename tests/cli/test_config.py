from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funcprobe.cli.config import Config, describe_keys, dump, load_config, parse_overrides
from funcprobe.cli.yaml_values import read_mapping, scalar
from funcprobe.errors import ConfigError
from funcprobe.objectives.by_name import OBJECTIVES
from funcprobe.types import TokenBudget

SMALLEST = "checkpoint: ck\nevaluation: e.parquet\nbatch: u.parquet\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(SMALLEST + text)
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def test_the_smallest_configuration_has_the_documented_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert config.optimizer == "auto"
    assert config.lr is None
    assert config.objective.name == "grpo"
    assert config.observable.model_dump() == {
        "integrand": "rao_blackwell",
        "weighting": "per_decision",
        "per": "token",
        "proposal": "anchor",
        "control_variate": False,
    }
    assert config.microbatching == TokenBudget(4096)
    assert config.output == tmp_path / "results"
    assert not config.force


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-8", 2e-8),
        ("2E-8", 2e-8),
        ("1e6", 1e6),
        (".5", 0.5),
        ("3", 3),
        ("1_000", 1000),
        ("010", 10),
        ("-1", -1),
        ("none", None),
        ("None", None),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", True),
        ("off", False),
        ("yes", True),
        ("No", False),
        ("true", True),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("nan", "nan"),
        ("1e", "1e"),
        ("dapo", "dapo"),
        ("a: b", "a: b"),
    ],
)
def test_plain_values_mean_what_they_look_like(text: str, value: object, tmp_path: Path) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    if text != "a: b":  # in a file this is a mapping
        (tmp_path / "c.yaml").write_text(f"key: {text}\n")
        assert read_mapping(tmp_path / "c.yaml") == {"key": value}


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_prints_is_read_back(number: float) -> None:
    assert scalar(repr(number)) == number


@pytest.mark.parametrize("word", ["none", "None", "null", "~", ""])
def test_none_is_none_where_a_field_may_be_none(word: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"lr: {word}\nbase_model: {word}\noptimizer: {word}\nmax_grad_norm: {word}\n")
    assert (config.lr, config.base_model, config.optimizer, config.max_grad_norm) == (None, None, None, None)


def test_none_is_a_word_where_an_option_takes_words(tmp_path: Path) -> None:
    text = "objective: {name: grpo, scale_rewards: none, delta: none}\n"
    options = load(tmp_path, text).objective.model_dump()
    assert options["scale_rewards"] == "none"
    assert options["delta"] is None
    assert load(tmp_path, "", "--objective.scale_rewards", "none").objective.model_dump()["scale_rewards"] == "none"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_built_with_its_options(name: str, tmp_path: Path) -> None:
    objective = load(tmp_path, f"objective: {{name: {name}, beta: 0.25}}\n").objective.build()
    assert objective == OBJECTIVES[name](beta=0.25)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: abc", "lr: found 'abc', expected a number ≥ 0, or none"),
        ("lr: -1", "lr: found -1, expected a number ≥ 0, or none"),
        ("lr: .inf", "lr: found inf, expected a number ≥ 0, or none"),
        ("lr: .nan", "lr: found nan, expected a number ≥ 0, or none"),
        ("lr: true", "lr: found true, expected a number"),
        ("lr: [1]", "lr: found [1], expected a number"),
        ("checkpoint2: x", "unknown key 'checkpoint2', did you mean 'checkpoint'? The keys are checkpoint, base_model"),
        ("learning_rate: 1", "unknown key 'learning_rate', did you mean 'lr'?"),
        ("zzzz: 1", "unknown key 'zzzz'. The keys are checkpoint"),
        ("on: 1", "unknown key 'on'"),
        ("top_k: 2.5", "top_k: found 2.5, expected an integer ≥ 0"),
        ("top_k: true", "top_k: found true, expected an integer"),
        ("microbatch: 0", "microbatch: found 0, expected an integer ≥ 1, or none"),
        ("max_grad_norm: 0", "max_grad_norm: found 0, expected a number > 0, or none"),
        ("ess_threshold: 1.1", "ess_threshold: found 1.1, expected a number from 0 to 1"),
        ("mode: on", "mode: found true, expected auto, forward or reverse (yes, no, on and off are true and false"),
        ("mode: sideways", "mode: found 'sideways', expected auto, forward or reverse"),
        ("optimizer: sgd", "optimizer: found 'sgd', expected auto, fresh or none"),
        ("force: 'on'", "force: found 'on', expected true or false"),
        ("force: 1", "force: found 1, expected true or false"),
        ("rounding: maybe", "rounding: found 'maybe', expected auto, true or false"),
        ("storage: 16", "storage: found 16, expected auto, none, or the name of a floating-point dtype"),
        ("dtype: 16", "dtype: found 16, expected the name of a floating-point dtype"),
        ("output: none", "output: found none, expected the path of a folder"),
        ("output: ''", "output: found '', expected the path of a folder"),
        ("base_model: ''", "base_model: found '', expected a folder, a model name, or none"),
        ("output: 500", "output: found 500, expected the path of a folder"),
        ("observable: entropy", "observable: found 'entropy', expected keys of its own: integrand"),
        ("observable: {per: day}", "observable.per: found 'day', expected token or sequence"),
        ("observable: {pr: token}", "unknown key 'observable.pr', did you mean 'observable.per'? The keys are obs"),
        ("objective: dapo", "objective: found 'dapo', expected keys of its own, objective.name"),
        ("objective: {name: grpi}", "objective.name: found 'grpi', expected one of reinforce, rloo, grpo"),
        ("objective: {name: [1]}", "objective.name: found '[1]', expected one of"),
        ("objective: {espilon: 1}", "unknown key 'objective.espilon', did you mean 'objective.epsilon'? The keys are"),
        ("objective: {epsilon: a}", "objective.epsilon: found 'a', expected a number"),
        ("objective: {epsilon: -1}", "objective: epsilon is -1.0; it must be a number at or above 0"),
        ("objective: {scale_rewards: on}", "objective.scale_rewards: found true, expected a word"),
        ("objective: {scale_rewards: x}", "objective: scale_rewards is 'x'; it must be one of group, batch, none"),
        ("microbatch: 4\nmicrobatch_tokens: 512", "microbatch and microbatch_tokens exclude one another"),
        ("optimizer: fresh", "lr: missing, and optimizer fresh has no learning rate of its own"),
        ("optimizer: none\nlr: 1", "lr: can do nothing with optimizer none"),
        ("mode: reverse\nrounding: false", "rounding: false can do nothing in mode reverse"),
        ("on_low_ess: raise\ness_threshold: 0", "on_low_ess: raise can do nothing with ess_threshold 0"),
        ("lr: 1\nlr: 2", "line 5, column 1: the key 'lr' stands here a second time"),
        ("objective: {name: grpo, name: dapo}", "the key 'name' stands here a second time"),
        ("lr: [1", "line 4, column 7: expected ',' or ']'"),
        ("? [a]\n: 1", "a key must be a word"),
        ("dtype: !!python/name:os.system", "could not determine a constructor for the tag"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(text: str, message: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'config.yaml'}: ")
    assert message in found


def test_all_problems_come_in_one_line(tmp_path: Path) -> None:
    found = refusal(tmp_path, "lr: a\ntop_k: -1\nnew: 1\nobjective: {beta: b}\n")
    for part in ("lr: found 'a'", "top_k: found -1", "unknown key 'new'", "objective.beta: found 'b'"):
        assert found.count(part) == 1
    assert "objective: found" not in found  # said once, at the option that is wrong


def test_missing_keys_are_named_with_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "checkpoint: missing, expected the path of a checkpoint folder" in str(caught.value)
    assert "batch: missing, expected the path of a rollout file" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the configuration is empty"),
        (b"# nothing\n", "the configuration is empty"),
        (b"- a\n", "found list, expected lines of the form 'key: value'"),
        (b"\xff\xfe\x00", "c.yaml: "),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)


def test_overrides_win_and_reach_inner_keys(tmp_path: Path) -> None:
    text = "lr: 1\nobjective: {name: grpo, beta: 0.5}\n"
    words = ["--lr", "2e-8", "--objective.name=dapo", "--observable.per", "sequence", "--max-grad-norm", "1", "--force"]
    config = load(tmp_path, text, *words)
    assert config.lr == 2e-8
    assert config.objective.build() == OBJECTIVES["dapo"](beta=0.5)
    assert (config.observable.per, config.max_grad_norm, config.force) == ("sequence", 1.0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lrr", "1"], "unknown option '--lrr', did you mean '--lr'? The keys are checkpoint"),
        (["--learning-rate", "1"], "did you mean '--lr'?"),
        (["--observable.pre", "token"], "unknown option '--observable.pre', did you mean '--observable.per'?"),
        (["--lr.x", "1"], "unknown option '--lr.x'"),
        (["--objective.espilon", "1"], "unknown key 'objective.espilon', did you mean 'objective.epsilon'?"),
        (["--lr"], "--lr has no value; write --lr VALUE"),
        (["--lr", "--force"], "--lr has no value"),
        (["--lr", "1", "--lr", "2"], "--lr stands twice"),
        (["lr", "1"], "'lr' stands where an option was expected"),
        (["--", "1"], "'--' stands where an option was expected"),
        (["--lr", "abc"], "lr: found 'abc', expected a number"),
        (["--lr", "-1e-3"], "lr: found -0.001, expected a number ≥ 0"),
        (["--objective", "dapo"], "--objective has keys of its own: give --objective.name"),
        (["--force", "maybe"], "force: found 'maybe', expected true or false"),
    ],
)
def test_wrong_overrides_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(tmp_path, "", *words)


def test_paths_are_relative_to_the_file_and_those_of_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = "output: ../out\nbase_model: base\n"
    config = load(tmp_path, text, "--batch", "mine.parquet", "--checkpoint", "500")
    assert config.evaluation == tmp_path / "e.parquet"
    assert config.batch == tmp_path / "here" / "mine.parquet"
    assert config.checkpoint == tmp_path / "here" / "500"
    assert config.output == Path(os.path.abspath(tmp_path / ".." / "out"))
    assert config.base_model == str(tmp_path / "base")


def test_a_base_model_that_is_no_path_stays_a_name(tmp_path: Path) -> None:
    assert load(tmp_path, "base_model: Qwen/Qwen3-0.6B\n").base_model == "Qwen/Qwen3-0.6B"
    assert load(tmp_path, "base_model: ./absent\n").base_model == str(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("microbatch: 3", 3),
        ("microbatch: 3\nmicrobatch_tokens: none", 3),
        ("microbatch: none\nmicrobatch_tokens: 99", TokenBudget(99)),
        ("microbatch_tokens: none", None),
        ("microbatch: none", TokenBudget(4096)),
    ],
)
def test_batches_are_cut_one_way(text: str, expected: object, tmp_path: Path) -> None:
    config = load(tmp_path, text)
    assert config.microbatching == expected
    assert type(config.microbatching) is type(expected)


@given(
    lr=st.none() | st.floats(0, 1),
    name=st.sampled_from(list(OBJECTIVES)),
    microbatch=st.none() | st.integers(1, 10),
    rounding=st.sampled_from(["auto", True, False]),
    folder=st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1).filter(
        lambda text: text.strip() and not text.startswith("~")
    ),
)
def test_a_dumped_configuration_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, lr: object, name: str, microbatch: object, rounding: object, folder: str
) -> None:
    place = tmp_path_factory.mktemp("dump")
    values = {"lr": lr, "microbatch": microbatch, "rounding": rounding, "output": place / folder}
    paths = {"checkpoint": place / folder, "evaluation": place / "e", "batch": place / "u"}
    config = load(place, f"objective: {{name: {name}}}\n")
    config = Config(**{**config.model_dump(include={"observable"}), "objective": config.objective, **paths, **values})
    (place / "again.yaml").write_text(dump(config), encoding="utf-8")
    assert load_config(place / "again.yaml") == config


def test_a_configuration_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, "").lr = 1.0  # type: ignore[misc]


def test_the_help_lists_every_key_with_its_default() -> None:
    text = describe_keys()
    for name in Config.model_fields:
        assert f"  {name}" in text
    for name in OBJECTIVES:
        assert name in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_bare_truth_values_and_equal_signs_are_read() -> None:
    assert parse_overrides(["--force", "--keep-delta", "false"]) == {"force": True, "keep_delta": False}
    assert parse_overrides(["--dtype=float64"]) == {"dtype": "float64"}
