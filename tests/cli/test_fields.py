"""The parts of a configuration: objectives, observable and options, each stated where it is made and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from funcprobe.cli.config import Config, ObservableConfig, describe_keys, dump, load_config
from funcprobe.cli.fields import MEASURING, objective_model
from funcprobe.errors import ConfigError
from funcprobe.estimators.observables import entropy
from funcprobe.measurement.options import Given, Options
from funcprobe.objectives.by_name import OBJECTIVES
from funcprobe.objectives.losses import BASES
from funcprobe.objectives.variants import VARIANTS, clip_cov, kl_cov, top_entropy_quantile


def load(folder: Path, objective: str, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(f"checkpoint: c\nevaluation: e\nbatch: u\nobjective: {objective}\n", encoding="utf-8")
    return load_config(path, overrides)


def test_a_variant_takes_its_own_options_and_its_base_s(tmp_path: Path) -> None:
    found = load(tmp_path, "{name: clip_cov, base: dapo, clip_cov_ratio: 0.01, epsilon: 0.1, seed: 3}").objective
    assert found.build() == clip_cov("dapo", clip_cov_ratio=0.01, epsilon=0.1, seed=3)
    assert load(tmp_path, "{name: top_entropy_quantile}").objective.build() == top_entropy_quantile()
    words = ("--objective.name", "kl_cov", "--objective.base", "bnpo", "--objective.epsilon", "1e9")
    assert load(tmp_path, "{}", *words).objective.build() == kl_cov("bnpo", epsilon=1e9)


@pytest.mark.parametrize("name", list(VARIANTS))
@pytest.mark.parametrize("base", list(BASES))
def test_every_variant_stands_on_every_base_and_is_written_back(name: str, base: str, tmp_path: Path) -> None:
    config = load(tmp_path, f"{{name: {name}, base: {base}, beta: 0.25}}")
    assert config.objective.build() == OBJECTIVES[name](base, beta=0.25)
    (tmp_path / "again.yaml").write_text(dump(config), encoding="utf-8")
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert again.objective.build() == config.objective.build()


def test_what_is_written_is_every_option_that_counts(tmp_path: Path) -> None:
    assert load(tmp_path, "{name: drop_negatives, base: cispo}").objective.model_dump() == {
        "name": "drop_negatives",
        "base": "cispo",
        "epsilon_high": 5.0,
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "scale_rewards": "group",
        "normaliser": None,
    }
    assert set(objective_model("kl_cov")().model_dump()) >= {"base", "kl_cov_ratio", "ppo_kl_coef", "epsilon"}
    assert "aggregation" not in objective_model("kl_cov")().model_dump()


def test_none_is_none_or_a_word_as_the_option_has_it(tmp_path: Path) -> None:
    found = load(tmp_path, "{name: kl_cov, base: dapo, epsilon_high: none, scale_rewards: none}").objective.build()
    assert found == kl_cov("dapo", epsilon_high=None, scale_rewards="none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: clip_cov, base: gpro}", "objective: base is 'gpro'; it must be one of reinforce, rloo, grpo"),
        ("{name: clip_cov, base: 3}", "objective.base: found 3, expected the name of a loss"),
        ("{name: clip_cov, base: kl_cov}", "objective: base is 'kl_cov'; it must be one of reinforce"),
        ("{name: clip_cov, base: [grpo]}", "objective.base: found ['grpo'], expected the name of a loss"),
        ("{name: clip_cov, seed: 0.5}", "objective.seed: found 0.5, expected an integer"),
        ("{name: clip_cov, seed: -1}", "objective: seed is -1; it must be a whole number at or above 0"),
        ("{name: clip_cov, clip_cov_ratio: many}", "objective.clip_cov_ratio: found 'many', expected a number"),
        (
            "{name: clip_cov, clip_cov_ration: 1}",
            "unknown key 'objective.clip_cov_ration', did you mean 'objective.clip",
        ),
        ("{name: clip_cov, epsilon: wide}", "objective.epsilon: found 'wide', expected a number"),
        ("{name: clip_cov, base: cispo, epsilon: 0.1}", "objective: 'clip_cov' over 'cispo' has no option 'epsilon'"),
        ("{name: clip_cov, base: cispo, epsilon_high: none}", "objective: epsilon_high is None; it must be a number"),
        ("{name: grpo, base: dapo}", "unknown key 'objective.base'"),
        ("{name: clip_kov}", "objective.name: found 'clip_kov', expected one of reinforce"),
    ],
)
def test_wrong_variants_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).count("objective") <= 20


def test_a_plain_objective_is_written_as_it_always_was(tmp_path: Path) -> None:
    found: dict[str, Any] = load(tmp_path, "{name: cispo}").objective.model_dump()
    assert list(found) == ["name", "epsilon_high", "beta", "use_bias_correction_kl", "scale_rewards", "normaliser"]


# options of a measurement, and of the entropy


def test_every_option_of_a_measurement_has_a_key_with_its_default_and_its_words() -> None:
    fields = {f.name: f for f in dataclasses.fields(Options)}
    assert set(fields) - set(MEASURING) == {"keep_scores"}  # tensors, which no folder holds
    help_text = describe_keys()
    for name in set(MEASURING) - {"microbatch"}:  # how batches are cut has two keys
        key, option = Config.model_fields[name], fields[name]
        assert key.default == option.default
        assert key.description == option.metadata["meaning"]
        assert isinstance(key.json_schema_extra, dict)
        assert key.json_schema_extra["expected"] == option.metadata["expected"]
        assert f"  {name} " in help_text
    assert set(get_type_hints(Given)) == set(fields)


def test_options_reach_a_verb_by_their_names(tmp_path: Path) -> None:
    config = load(tmp_path, "{}", "--order", "2", "--top-k", "3", "--microbatch", "5")
    options = config.options()
    assert Options(**options) == Options(order=2, top_k=3, microbatch=5)
    assert set(config.options("top_k", "order")) == set(options) - {"top_k", "order"}
    assert Options(**load(tmp_path, "{}").options()) == Options()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tolerance", "0"], "tolerance: found 0, expected a number > 0"),
        (["--level", "1"], "level: found 1, expected a number between 0 and 1"),
        (["--ess-threshold", "-1"], "ess_threshold: found -1, expected a number from 0 to 1"),
        (["--top-k", "-1"], "top_k: found -1, expected an integer ≥ 0"),
        (["--seed", "-1", "--bars", "bootstrap"], "seed: found -1, expected an integer ≥ 0"),
        (["--order", "3"], "order: found 3, expected auto, 1 or 2"),
        (["--bars", "whiskers"], "bars: found 'whiskers', expected auto, jackknife, infinitesimal, bootstrap or none"),
        (["--observable.weighting", "none"], "observable.weighting: found none, expected per_decision or sequence"),
        (["--observable.control-variate", "3"], "observable.control_variate: found 3, expected true or false"),
        (["--keep-scores"], "unknown option '--keep_scores'"),
        (["--update", "u"], "unknown option '--update', did you mean '--batch'?"),
    ],
)
def test_values_out_of_the_range_that_an_option_states_are_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "{}", *words)
    assert message in str(caught.value)


def test_the_observable_has_the_options_of_entropy_with_their_defaults_and_a_meaning_each(tmp_path: Path) -> None:
    parameters = inspect.signature(entropy).parameters
    assert list(ObservableConfig.model_fields) == list(parameters)
    for name, field in ObservableConfig.model_fields.items():
        assert field.default == parameters[name].default
        assert field.description, name
    assert load(tmp_path, "{}").observables == {"entropy": entropy()}
    for name, hint in get_type_hints(entropy).items():
        for value in map(str, get_args(hint)):
            found = load(tmp_path, "{}", f"--observable.{name}", value).observables["entropy"]
            assert found == entropy(**{name: value})  # type: ignore[arg-type]
