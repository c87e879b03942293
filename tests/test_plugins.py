"""What other installed packages bring: found by name wherever one is taken, refused calmly where it is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funcprobe as fp
from funcprobe import plugins
from funcprobe.cli.config import describe_keys, load_config
from funcprobe.data.files import read_metadata
from funcprobe.errors import ConfigError, InputError
from funcprobe.estimators.by_name import observable_named, observable_names
from funcprobe.objectives.by_name import objective, objective_names
from tests.cases.packages import Install, install, write_package

__all__ = ["install"]  # a fixture

SOURCE = """\
import funcprobe as fp


@fp.observable("depth", "tokens")
def _depth(scores, anchor, rollouts):
    return scores.logp.sum()


def depth():
    return _depth


def steady(strength: float = 0.5, base: str = "none"):
    return fp.grpo(beta=strength)


def anything(**options):
    return fp.grpo(**options)


def read(path):
    first, *rest = path.read_text().split()
    return fp.rollouts_from_lists([[int(first)]], [[int(x) for x in rest]], temperature=1.0, step=[3])


def number():
    return 3


def broken(*_, **__):
    raise RuntimeError("no  disk\\nleft")


THREE, repr = 3, repr
"""


def entries(**groups: dict[str, str]) -> dict[str, dict[str, str]]:
    return {
        f"funcprobe.{kind}": {name: f"guest:{thing}" for name, thing in named.items()} for kind, named in groups.items()
    }


def config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(f"checkpoint: c\nevaluation: e\nbatch: u\n{text}", encoding="utf-8")
    return path


# observables


def test_an_observable_is_found_by_its_name_in_also(install: Install, tmp_path: Path) -> None:
    install("guest", entries(observables={"depth": "depth"}), SOURCE)
    assert observable_names() == ("reward", "kl", "kl_before", "length", "depth")
    assert observable_named("depth").unit == "tokens"
    found = load_config(config(tmp_path, "also: [reward, depth]\n"))
    assert [(name, o.name) for name, o in found.observables.items()][1:] == [
        ("reward", "expected reward"),
        ("depth", "depth"),
    ]
    assert "reward, kl, kl_before, length, depth" in describe_keys()


def test_an_unknown_observable_is_refused_with_every_name_there_is(install: Install, tmp_path: Path) -> None:
    install("guest", entries(observables={"depth": "depth"}), SOURCE)
    with pytest.raises(InputError, match=r"no observable named 'fame'; the observables are reward, .* length, depth"):
        observable_named("fame")
    with pytest.raises(ConfigError, match=r"also: found 'fame', expected a list of reward, kl, .* length and depth"):
        load_config(config(tmp_path, "also: [fame]\n"))


# objectives


def test_an_objective_is_found_by_its_name_with_its_options(install: Install, tmp_path: Path) -> None:
    install("guest", entries(objectives={"steady": "steady", "anything": "anything"}), SOURCE)
    assert objective_names()[-2:] == ("anything", "steady")
    assert objective("steady", strength=0.25) == fp.grpo(beta=0.25)
    assert objective("anything", beta=0.125) == fp.grpo(beta=0.125)
    found = load_config(config(tmp_path, "objective: {name: steady, strength: 0.25}\n"))
    assert found.objective.build() == fp.grpo(beta=0.25)
    assert load_config(config(tmp_path, "objective: {name: steady}\n")).objective.build() == fp.grpo(beta=0.5)
    with pytest.raises(ConfigError, match=r"objective.strength: found 'much', expected a number"):
        load_config(config(tmp_path, "objective: {name: steady, strength: much}\n"))
    with pytest.raises(InputError, match=r"'steady' has no option 'epsilon'; its options are strength"):
        objective("steady", epsilon=0.1)
    assert "steady" in describe_keys()


# readers


def test_a_reader_is_found_by_the_suffix_of_a_file(install: Install, tmp_path: Path) -> None:
    install("guest", entries(readers={"mine": "read"}), SOURCE)
    path = tmp_path / "rows.mine"
    path.write_text("5 6 7")
    assert fp.read_rollouts(path).ids.tolist() == [[5, 6, 7]]
    assert fp.read_rollouts(path, step=3).step == torch.tensor([3])
    assert read_metadata(path) == {"schema_version": None, "tokenizer": None, "retokenized": False}
    with pytest.raises(InputError, match=r"rows.mine: no row is of step 4; the file has 1 steps from 3 to 3"):
        fp.read_rollouts(path, step=4)
    with pytest.raises(InputError, match=r"rows.mine: .*7.*vocabulary"):
        fp.read_rollouts(path, vocab_size=7)
    with pytest.raises(InputError, match=r"absent.mine: there is no such file"):
        fp.read_rollouts(tmp_path / "absent.mine")
    with pytest.raises(InputError, match=r"extension '.other' is not known; expected .parquet or .jsonl or .mine"):
        fp.read_rollouts(tmp_path / "rows.other")
    with pytest.raises(InputError, match=r"extension '.mine' is not known; expected .parquet or .jsonl"):
        fp.write_rollouts(tmp_path / "new.mine", fp.read_rollouts(path))


# what is wrong


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("absent", "The observable 'bad' of guest (guest:absent) cannot be loaded: AttributeError: "),
        ("THREE", "The observable 'bad' of guest (guest:THREE) is int; expected a function without required arguments"),
        ("number", "The observable 'bad' gave int; expected a function without required arguments that returns an obs"),
        ("broken", "The observable 'bad' of guest (guest:broken) failed: RuntimeError: no disk left."),
    ],
)
def test_what_is_not_what_its_group_expects_is_one_calm_error(
    thing: str, message: str, install: Install, tmp_path: Path
) -> None:
    install("guest", entries(observables={"bad": thing}), SOURCE)
    with pytest.raises(InputError) as caught:
        observable_named("bad")
    assert message in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_config(config(tmp_path, "also: bad\n"))
    assert message.rstrip(".") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_cannot_be_imported_is_one_calm_error(install: Install, tmp_path: Path) -> None:
    install("guest", entries(objectives={"bad": "x"}, readers={"bad": "x"}), "import nowhere_at_all")
    with pytest.raises(InputError, match=r"objective 'bad' of guest .* cannot be loaded: ModuleNotFoundError"):
        objective("bad")
    with pytest.raises(ConfigError, match=r"objective.name: The objective 'bad' of guest .* mend or uninstall it"):
        load_config(config(tmp_path, "objective: {name: bad}\n"))
    (tmp_path / "a.bad").write_text("1")
    with pytest.raises(InputError, match=r"a.bad: The reader 'bad' of guest"):
        fp.read_rollouts(tmp_path / "a.bad")


def test_things_of_the_wrong_kind_are_refused_where_they_are_used(install: Install, tmp_path: Path) -> None:
    install(
        "guest", entries(objectives={"bad": "number"}, readers={"bad": "broken", "odd": "str"}), SOURCE + "str = str"
    )
    with pytest.raises(InputError, match=r"objective 'bad' gave int; expected a function of options that returns an"):
        objective("bad")
    for name, message in (
        ("bad", "failed: RuntimeError"),
        ("odd", "reader 'odd' gave str; expected a function of"),
    ):
        (tmp_path / f"a.{name}").write_text("1")
        with pytest.raises(InputError, match=message):
            fp.read_rollouts(tmp_path / f"a.{name}")


def test_a_name_that_two_have_is_an_error_that_names_both(install: Install, tmp_path: Path) -> None:
    install("guest", entries(objectives={"grpo": "steady", "twice": "steady"}, readers={"jsonl": "read"}), SOURCE)
    install("other-guest", {"funcprobe.objectives": {"twice": "other_guest:steady"}}, SOURCE)
    with pytest.raises(InputError, match=r"'grpo' is brought by funcprobe itself and by guest .guest:steady.; "):
        objective("grpo")
    with pytest.raises(InputError, match=r"'twice' is brought by (other-)?guest .* and by (other-)?guest "):
        objective("twice")
    with pytest.raises(
        ConfigError, match=r"objective.name: The objective 'grpo' is brought by funcprobe itself and by"
    ):
        load_config(config(tmp_path, "objective: {name: grpo, beta: 0.25}\n"))
    with pytest.raises(InputError, match=r"reader 'jsonl' is brought by funcprobe itself and by guest"):
        fp.read_rollouts(tmp_path / "a.jsonl")
    assert objective("dapo") == fp.dapo()  # the others are as they were
    assert objective_names().count("grpo") == 1


def test_nothing_of_a_package_is_imported_before_it_is_named(tmp_path: Path) -> None:
    write_package(tmp_path, "guest", entries(observables={"depth": "depth"}), SOURCE)
    code = (
        "import sys; from funcprobe import plugins; assert plugins.names('observable', {}) == ('depth',); "
        "assert 'guest' not in sys.modules and 'torch' not in sys.modules; "
        "assert plugins.find('observable', 'absent', {}) is None; assert 'guest' not in sys.modules"
    )
    folders = [str(tmp_path), str(Path(fp.__file__).parents[1])]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(folders)})


def test_what_is_there_is_listed_own_names_first(install: Install) -> None:
    assert plugins.names("tracker", {"b": print, "a": print}) == ("b", "a")
    install("guest", entries(trackers={"z": "broken", "c": "broken", "b": "broken"}), SOURCE)
    assert plugins.names("tracker", {"b": print, "a": print}) == ("b", "a", "c", "z")
