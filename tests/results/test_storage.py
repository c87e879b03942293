"""Every kind of result is kept in one format: it comes back as it was saved, and damage is refused calmly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import funcprobe as fp
from funcprobe.data.atomic import fresh_directory
from funcprobe.data.ownership import MARKER
from funcprobe.errors import InputError
from funcprobe.results.storage import ARRAYS, NUMBERS, SCHEMA_VERSION
from tests.cases.kept import same
from tests.cases.written_attribution import attribution, with_bars, words
from tests.cases.written_comparison import comparison
from tests.cases.written_diagnosis import diagnosis
from tests.cases.written_probe import result, warned
from tests.cases.written_sweep import sweep

DELTA = {"model.a.weight": torch.tensor([[1.0, -2.0]]), "model.b.weight": torch.tensor([3.0])}

RESULTS: dict[str, Callable[[], Any]] = {
    "probe": lambda: result(warnings=warned("careful"), checks=("copied",)),
    "probe with Δθ": lambda: result(delta=DELTA),
    "sweep": lambda: sweep(notes=warned("decided", kind="not proportional")),
    "sweep without bars": lambda: sweep(bars=False),
    "comparison": lambda: comparison(notes=warned("decided")),
    "attribution": lambda: with_bars(attribution(vocabulary=words(), influence=True, hole=True), 1e-7, "layers"),
    "attribution, plain": attribution,
    "diagnosis": lambda: diagnosis(warnings=warned("careful")),
}


@pytest.mark.parametrize("which", RESULTS)
def test_what_is_loaded_is_what_was_saved(which: str, tmp_path: Path) -> None:
    saved = RESULTS[which]()
    assert saved.save(tmp_path / "one") == tmp_path / "one"
    for loaded in (fp.load(tmp_path / "one"), type(saved).load(tmp_path / "one")):
        assert same(loaded, saved)
        assert loaded.summary() == saved.summary()
        assert loaded._repr_html_() == saved._repr_html_()
        assert loaded.to_dict() == saved.to_dict()
    fp.load(tmp_path / "one").save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("which", RESULTS)
def test_it_is_strict_json_with_its_kind_and_arrays_only_where_there_are_some(which: str, tmp_path: Path) -> None:
    saved = RESULTS[which]()
    saved.save(tmp_path / "out")
    arrays = which not in ("probe", "sweep without bars")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {MARKER, *((NUMBERS, ARRAYS) if arrays else (NUMBERS,))}

    def refused(word: str) -> None:
        raise AssertionError(word)

    plain = json.loads((tmp_path / "out" / NUMBERS).read_text(), parse_constant=refused)
    assert (plain["schema_version"], plain["kind"]) == (SCHEMA_VERSION, saved.kind)
    assert saved.to_dict().keys() == plain.keys()


def test_only_scores_are_left_behind(tmp_path: Path) -> None:
    kept = result(evidence=object())
    kept.save(tmp_path / "out")
    assert fp.ProbeResult.load(tmp_path / "out").evidence is None
    assert fp.load(tmp_path / "out") == result()


def test_another_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    attribution().save(tmp_path / "out")
    with pytest.raises(InputError, match="a result of kind 'attribution', and one of kind 'probe' was asked for; func"):
        fp.ProbeResult.load(tmp_path / "out")
    changed(tmp_path / "out", kind="tomorrow")
    with pytest.raises(InputError, match="of kind 'tomorrow'; this funcprobe reads probe, sweep, curve, comparison"):
        fp.load(tmp_path / "out")


def test_nothing_is_overwritten_without_a_word(tmp_path: Path) -> None:
    result().save(tmp_path / "out")
    with pytest.raises(InputError, match="exists already and is not overwritten"):
        sweep().save(tmp_path / "out")
    assert isinstance(fp.load(tmp_path / "out"), fp.ProbeResult)
    sweep().save(tmp_path / "out", overwrite=True)
    assert isinstance(fp.load(tmp_path / "out"), fp.SweepResult)
    result().save(tmp_path / "out", overwrite=True)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [MARKER, NUMBERS]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        result().save(tmp_path / "file", overwrite=True)


def test_a_run_that_dies_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), fresh_directory(target) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with fresh_directory(target) as folder:
        (folder / "one").write_text("old")
    with pytest.raises(ZeroDivisionError), fresh_directory(target, overwrite=True) as folder:
        (folder / "one").write_text(str(1 / 0))
    assert (target / "one").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def changed(folder: Path, **fields: Any) -> None:
    """Write other fields into result.json; ... removes one."""
    file = folder / NUMBERS
    plain = {**json.loads(file.read_text(encoding="utf-8")), **fields}
    file.write_text(json.dumps({n: x for n, x in plain.items() if x is not ...}), encoding="utf-8")


def without(folder: Path, name: str) -> None:
    """Take an array out of result.safetensors, and say that this is the file."""
    found = load_file(folder / ARRAYS)
    del found[name]
    save_file(found, folder / ARRAYS)
    other = fp.results.storage._digest(folder / ARRAYS)  # type: ignore[attr-defined]
    changed(folder, arrays=other)


def of_another(folder: Path) -> None:
    attribution(scale=2e-5).save(folder.parent / "other")
    (folder / ARRAYS).write_bytes((folder.parent / "other" / ARRAYS).read_bytes())


def one_bit(folder: Path) -> None:
    data = bytearray((folder / ARRAYS).read_bytes())
    data[-1] ^= 1
    (folder / ARRAYS).write_bytes(data)


def unreadable(folder: Path) -> None:
    (folder / ARRAYS).write_bytes(b"\x08\x00\x00")
    changed(folder, arrays=fp.results.storage._digest(folder / ARRAYS))  # type: ignore[attr-defined]


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no arrays": (lambda f: (f / ARRAYS).unlink(), r"holds no result\.safetensors, and result\.json in it refers"),
    "no numbers": (lambda f: (f / NUMBERS).unlink(), r"holds no result\.json; expected a folder that a result's save"),
    "cut numbers": (lambda f: (f / NUMBERS).write_text('{"schema_version": 3, "k'), "is not JSON .*; the file is dam"),
    "deep numbers": (lambda f: (f / NUMBERS).write_text("[" * 10**5), "is not JSON .*; the file is damaged"),
    "no text": (lambda f: (f / NUMBERS).write_bytes(b"\xff\xfe{"), "the file is not UTF-8 text"),
    "no object": (lambda f: (f / NUMBERS).write_text("[1, 2]"), "has schema version None; this funcprobe reads 3"),
    "of tomorrow": (lambda f: changed(f, schema_version=4), "has schema version 4; this funcprobe reads 3"),
    "no version": (lambda f: changed(f, schema_version=...), "has schema version None; this funcprobe reads 3"),
    "no kind": (lambda f: changed(f, kind=...), "holds a result of kind 'None'"),
    "cut arrays": (lambda f: (f / ARRAYS).write_bytes(b"\x08\x00\x00"), r"is not the file that result\.json was saved"),
    "a bit of them": (one_bit, r"is not the file that result\.json was saved with; it is damaged, or another result's"),
    "of another": (of_another, r"is not the file that result\.json was saved with"),
    "no safetensors": (unreadable, r"result\.safetensors holds no arrays .*; it is damaged"),
    "odd digest": (lambda f: changed(f, arrays=3), r"result\.json holds 3 as arrays, expected a digest"),
    "no digest": (lambda f: changed(f, arrays=None), "an array that is not in result.safetensors.; its files are dam"),
    "no leaves": (lambda f: changed(f, leaves=...), "not? whole attribution .leaves is missing.; its files are damag"),
    "odd leaves": (lambda f: changed(f, leaves=[{"name": "w", "weight": 1}]), r"leaves\.0\.contribution is missing"),
    "unknown observable": (lambda f: changed(f, observable="joy"), "no reading of the observable .joy.; it has rao"),
    "odd words": (lambda f: changed(f, vocabulary=[1]), "vocabulary"),
    "a field more": (lambda f: changed(f, more=1), "more is unknown"),
    "no scores": (lambda f: without(f, "batch.scores.logp"), r"batch\.scores\.logp is an array that is not in result"),
    "half the parts": (lambda f: without(f, "evaluation.through.logp"), "its files are damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused(damage: str, tmp_path: Path) -> None:
    attribution().save(tmp_path / "out")
    change, said = DAMAGE[damage]
    change(tmp_path / "out")
    for load in (fp.load, fp.Attribution.load):
        with pytest.raises(InputError, match=said) as caught:
            load(tmp_path / "out")
        assert "result." in str(caught.value) or str(tmp_path / "out") in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for cls in (fp.ProbeResult, fp.SweepResult, fp.Comparison, fp.Attribution):
        with pytest.raises(InputError, match=r"nowhere holds no result\.json; expected a folder that"):
            cls.load(tmp_path / "nowhere")


def test_every_kind_is_loaded_without_a_model_or_its_libraries(tmp_path: Path) -> None:
    for name, make in RESULTS.items():
        make().save(tmp_path / name)
    code = f"""
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "peft", "tokenizers", "rich", "matplotlib", "pandas", "jinja2"):
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Blocked())
import funcprobe as fp
for name in {list(RESULTS)!r}:
    found = fp.load({str(tmp_path)!r} + "/" + name)
    print(len(found.summary()), len(found._repr_html_()))
assert not {{"transformers", "peft"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    told = [(len(found.summary()), len(found._repr_html_())) for found in (make() for make in RESULTS.values())]
    assert [tuple(map(int, line.split())) for line in run.stdout.splitlines()] == told
