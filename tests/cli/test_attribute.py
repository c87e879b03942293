"""`funcprobe attribute`, from configuration to tables, pictures and pages; whole or not at all."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from funcprobe import __version__
from funcprobe.cli.attribute import COMMAND
from funcprobe.cli.main import main
from funcprobe.report.terminal import text_of
from funcprobe.results.attribution import Attribution
from funcprobe.results.probe import ProbeResult
from tests.cases.heat_map_pages import data, page
from tests.cases.world import World

Refused = Callable[..., str]
TOKENS = ("tokens", "sequences", "prompts", "positions")


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One attribution with a matrix; the folder that it wrote."""
    place = tmp_path_factory.mktemp("attributed")
    assert main(["attribute", str(world.config(place, also=["reward"])), "--influence", "prompts"]) == 0
    assert sorted(p.name for p in place.iterdir()) == ["config.yaml", "results-attribution"]
    return place / "results-attribution"


def columns(folder: Path, name: str) -> dict[str, list]:
    return pq.read_table(folder / f"{name}.parquet").to_pydict()


def test_it_writes_everything_that_it_says(done: Path) -> None:
    assert {p.name for p in done.iterdir()} == COMMAND.written
    found = Attribution.load(done)
    assert found.influence is not None
    assert found.vocabulary is not None
    assert (done / "summary.txt").read_text(encoding="utf-8") == text_of(found)
    assert (done / "config.yaml").read_text().startswith(f"# As attributed by funcprobe {__version__};")


def test_every_table_sums_to_the_first_order_of_the_result(done: Path) -> None:
    found = Attribution.load(done)
    whole = found.probe.first_order
    assert whole == found.reading.first_order != 0
    for name in ("parameters", "layers", "kinds", *(f"evaluation-{t}" for t in TOKENS)):
        parts = columns(done, name)["contribution"]
        assert math.fsum(parts) == pytest.approx(whole, abs=1e-5 * math.fsum(map(abs, parts))), name
    ledger = found.ledger
    assert sum(ledger.values()) == pytest.approx(whole, rel=1e-4)
    for table in TOKENS:
        parts = columns(done, f"batch-{table}")["contribution"]
        assert math.fsum(parts) == pytest.approx(ledger["gradient on U"], rel=1e-9), table
    matrix = columns(done, "influence")
    assert len(matrix.pop("prompt")) == 6
    rows = columns(done, "batch-sequences")["contribution"]
    scale = max(map(abs, rows))
    assert [math.fsum(x) for x in matrix.values()] == pytest.approx(rows, abs=1e-4 * scale)


def test_tables_hold_what_they_are_read_for(done: Path, world: World) -> None:
    tokens = columns(done, "batch-tokens")
    assert len(tokens["token"]) == int(world.batch.completion_mask.sum())
    assert set(tokens) >= {"sequence", "prompt", "position", "text", "logp", "entropy", "advantage", "reward"}
    assert "<eos>" in tokens["text"]
    assert "=" in columns(done, "batch-prompts")["text"][0]
    said = pq.read_schema(done / "batch-tokens.parquet").metadata
    assert said[b"unit"] == b"nats per token"
    assert said[b"observable"] == b"entropy"


def test_pages_and_pictures_are_of_this_step(done: Path) -> None:
    for of in ("batch", "evaluation"):
        document = page(done / f"{of}.html")
        tokens = columns(done, f"{of}-tokens")
        assert data(document)["contribution"].tolist() == pytest.approx(tokens["contribution"], rel=1e-6)
        assert len(document.one("main").all("i")) == len(tokens["token"])
        assert "<eos>" in document.one("main").text
    assert all((done / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in ("layers", "tokens", "influence"))


def test_it_attributes_the_step_that_run_measures(done: Path, world: World, tmp_path: Path) -> None:
    assert main(["run", str(world.config(tmp_path, also=["reward"]))]) == 0
    one, other = ProbeResult.load(tmp_path / "results"), Attribution.load(done).probe
    assert other.first_order == pytest.approx(one.first_order, rel=1e-6)
    assert other.change == pytest.approx(one.change, rel=1e-6)
    assert list(other.readings) == ["entropy", "reward"]


def test_the_summary_is_printed_and_the_last_line_says_where_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    output = tmp_path / "who"
    words = ["--form=jacobian", "--output", str(output), "--lr", "2e-5", "--keep-delta"]
    assert main(["attribute", str(world.config(tmp_path)), *words]) == 0
    out, err = capsys.readouterr()
    assert out == (output / "summary.txt").read_text(encoding="utf-8") + f"Results: {output}\n"
    assert max(len(line) for line in out.splitlines()[:-1]) <= 80
    assert err == ""
    assert Attribution.load(output).form == "jacobian"
    assert Attribution.load(output).probe.delta is not None
    assert not (output / "influence.parquet").exists()
    as_run = yaml.safe_load((output / "config.yaml").read_text())
    assert (as_run["lr"], as_run["output"]) == (2e-5, str(output))


def test_rows_get_error_bars_where_they_are_asked_for(world: World, tmp_path: Path) -> None:
    words = ["--bars-of", "ledger, layers,prompts", "--bars", "jackknife"]
    assert main(["attribute", str(world.config(tmp_path)), *words]) == 0
    folder = tmp_path / "results-attribution"
    layers, prompts = columns(folder, "layers"), columns(folder, "batch-prompts")
    for table in (layers, prompts):
        ends = zip(table["low"], table["contribution"], table["high"], table["error"], strict=True)
        moved = [row for row in ends if row[1]]  # all rewards of a prompt may be equal: then it moves nothing
        assert len(moved) > 2
        assert all(low < x < high and error > 0 for low, x, high, error in moved)
    assert "error" not in columns(folder, "kinds")
    said = (folder / "summary.txt").read_text(encoding="utf-8")
    first = next(line for line in said.splitlines() if line.endswith("layer 0"))
    assert f" {layers['error'][layers['layer'].index('layer 0')]:.1e} " in first
    assert next(line for line in said.splitlines() if "by momentum" in line).count("±") == 1


def test_a_checkpoint_without_a_tokenizer_shows_ids(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder / "checkpoint", tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").glob("*token*"):
        path.unlink()
    assert main(["attribute", str(world.config(tmp_path, checkpoint="checkpoint"))]) == 0
    folder = tmp_path / "results-attribution"
    tokens = columns(folder, "batch-tokens")
    assert tokens["text"] == [f"[{i}]" for i in tokens["token"]]
    assert f"[{tokens['token'][0]}]" in page(folder / "batch.html").one("main").text


def test_a_file_under_one_of_our_names_is_not_taken_for_ours(world: World, tmp_path: Path, refused: Refused) -> None:
    config = world.config(tmp_path)
    folder = tmp_path / "results-attribution"
    folder.mkdir()
    (folder / "layers.png").write_bytes(b"old")
    assert "exists already; choose another folder, or replace it with --force." in refused("attribute", config)
    assert "holds 'layers.png', which funcprobe did not write" in refused("attribute", config, "--force")
    assert (folder / "layers.png").read_bytes() == b"old"


def test_what_fails_late_leaves_nothing(
    world: World, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from funcprobe.cli import attribute as command
    from funcprobe.errors import InputError

    def full(*_: object) -> None:
        raise InputError("The disk is full.")

    monkeypatch.setattr(command, "heat_map", full)
    assert "The disk is full." in refused("attribute", world.config(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--influence", "layers"], "--influence: found 'layers', expected sequences or prompts."),
        (["--influence"], "--influence has no value; write --influence prompts."),
        (["--influence", "--force"], "--influence has no value"),
        (["--form", "exact"], "--form: found 'exact', expected auto, additive or jacobian."),
        (["--form", "auto", "--form=auto"], "--form stands twice; give it once."),
        (
            ["--bars-of", "layers,tokens"],
            "--bars-of: found 'tokens', expected ledger, parameters, layers, kinds,",
        ),
        (["--bars-of", "ledger", "--bars", "none"], "--bars-of: can do nothing with bars none; leave one of them out."),
        (["--bars-of", "ledger", "--form", "jacobian"], "--bars-of: can do nothing with form jacobian, in which"),
        (
            ["--mode", "reverse"],
            "mode: reverse keeps no tangents of tokens, which contributions are made of; use auto.",
        ),
        (["--lrs", "1e-6"], "unknown option '--lrs'"),
        (["--optimizer", "none"], "optimizer: none leaves no step to measure"),
    ],
)
def test_bad_words_are_one_calm_line(
    words: list[str], message: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused("attribute", world.config(tmp_path), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("package", ["jinja2", "pyarrow.parquet"])
def test_what_is_missing_is_said_before_anything_is_computed(
    package: str, world: World, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from funcprobe.cli import attribute as command

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(command, "prepared", lambda *_: pytest.fail("the checkpoint was loaded"))
    assert f"'{package.partition('.')[0]}', which is not installed" in refused("attribute", world.config(tmp_path))


def test_help_teaches_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["attribute", "--help"], ["attribute", "config.yaml", "--lr", "1", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert "funcprobe attribute config.yaml --influence prompts" in out
        assert max(map(len, out.splitlines())) <= 90
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "funcprobe attribute config.yaml" in capsys.readouterr().out


def test_the_demo_says_what_to_run_next(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from funcprobe.cli import demo

    monkeypatch.setattr(demo, "prepare_demo", lambda *_, **__: Path("somewhere/config.yaml"))
    monkeypatch.setattr(demo, "carry_out", lambda *_: None)
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "Next:    funcprobe sweep somewhere/config.yaml --lrs 1e-8:1e-3:11",
        "         funcprobe diagnose somewhere/config.yaml",
        "         funcprobe attribute somewhere/config.yaml",
    ]
