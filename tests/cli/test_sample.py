from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from funcprobe import engine
from funcprobe.checkpoints import load_checkpoint
from funcprobe.cli.demo_task import SYMBOLS, build_tokenizer, reward
from funcprobe.cli.main import main
from funcprobe.cli.prompts import read_prompts
from funcprobe.data.files import read_rollouts
from funcprobe.errors import InputError
from tests.cases.world import World

Refused = Callable[..., str]
TEXTS = ["12=", "345=", "9="]
ONE, TWO, THREE, EQUALS = (SYMBOLS.index(symbol) for symbol in "123=")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


def words(world: World, prompts: Path, output: Path, *more: str) -> list[str]:
    required = ["--temperature", "0.7", "--output", str(output), "--max-new-tokens", "4"]
    return ["sample", str(world.folder / "checkpoint"), str(prompts), *required, *more]


def test_rollouts_are_drawn_scored_and_ready_for_run(
    world: World, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--group-size", "2", "--reward", "funcprobe.cli.demo_task:reward"]
    for name, seed in (("evaluation", "1"), ("batch", "2")):
        assert main(words(world, prompts, tmp_path / f"{name}.parquet", *options, "--seed", seed)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("6 rollouts, ")
    assert out.splitlines()[0].endswith(f": {tmp_path / 'evaluation.parquet'}")

    found, tokenizer = read_rollouts(tmp_path / "evaluation.parquet"), build_tokenizer()
    assert found.temperature.tolist() == [0.7] * 6
    assert found.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    completions = [
        tokenizer.decode(row[start : int(keep.sum())], skip_special_tokens=True)
        for row, start, keep in zip(found.ids, found.prompt_lengths, found.attention_mask, strict=True)
    ]
    assert found.rewards is not None
    assert found.rewards.tolist() == reward([text for text in TEXTS for _ in range(2)], completions)

    checkpoint = load_checkpoint(world.folder / "checkpoint", optimizer=None)
    scores = engine.scores(checkpoint.policy, checkpoint.params, found)
    # float32 log-probabilities of magnitude 1, by cache and by whole rows
    torch.testing.assert_close(scores.logp, found.sampling_logps, rtol=0, atol=2e-5)

    config = world.config(tmp_path, evaluation="evaluation.parquet", batch="batch.parquet")
    assert main(["run", str(config)]) == 0


@pytest.mark.parametrize("ends", [3, [2, 5], [4]])
def test_a_completion_ends_with_every_end_token_of_the_checkpoint(
    world: World, prompts: Path, tmp_path: Path, ends: int | list[int]
) -> None:
    folder = shutil.copytree(world.folder / "checkpoint", tmp_path / "checkpoint")
    config = folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": ends}))
    changed = words(world, prompts, tmp_path / "e.jsonl", "--group-size", "16")
    changed[1] = str(folder)
    assert main(changed) == 0
    stops = {build_tokenizer().eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    rows = [json.loads(line)["completion_ids"] for line in (tmp_path / "e.jsonl").read_text().splitlines()[1:]]
    assert not any(stops & set(row[:-1]) for row in rows)
    assert all(row[-1] in stops or len(row) == 4 for row in rows)
    assert any(row[-1] in stops - {build_tokenizer().eos_token_id} for row in rows)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_chat_prompts_take_the_checkpoints_template(world: World, tmp_path: Path, place: str) -> None:
    template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    folder = shutil.copytree(world.folder / "checkpoint", tmp_path / "checkpoint")
    if place.endswith("jinja"):
        (folder / place).write_text(template)
    else:
        (folder / place).write_text(json.dumps({**json.loads((folder / place).read_text()), "chat_template": template}))
    path = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "12"}]}])
    changed = words(world, path, tmp_path / "e.jsonl")
    changed[1] = str(folder)
    assert main(changed) == 0
    found = read_rollouts(tmp_path / "e.jsonl")
    assert found.ids[0, : found.prompt_lengths[0]].tolist() == [ONE, TWO, EQUALS]


def test_chat_prompts_without_a_template_are_one_calm_line(world: World, tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "12"}]}])
    line = refused(*words(world, path, tmp_path / "e.jsonl"))
    assert "has no chat template (tokenizer_config.json or chat_template.jinja of the checkpoint)" in line
    assert not (tmp_path / "e.jsonl").exists()


def test_equal_seeds_draw_equal_rollouts_and_others_do_not(world: World, prompts: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(words(world, prompts, tmp_path / f"{name}.jsonl", "--seed", seed)) == 0
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b
    assert a != c


def test_an_existing_file_is_replaced_only_by_force(
    world: World, prompts: Path, tmp_path: Path, refused: Refused
) -> None:
    output = tmp_path / "a.jsonl"
    output.write_text("mine")
    said = refused(*words(world, prompts, output))
    assert f"--output: {output} exists already; choose another name, or replace it with --force." in said
    assert output.read_text() == "mine"
    assert main(words(world, prompts, output, "--force")) == 0
    assert len(read_rollouts(output).ids) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--temperature", "0"], "--temperature: found '0', expected a number above 0"),
        (["--temperature", "nan"], "--temperature: found 'nan', expected a number above 0"),
        (["--temperature", "warm"], "--temperature: found 'warm', expected a number above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: found '0', expected a whole number from 1 to 1,000,000"),
        (["--group-size", "0"], "--group-size: found '0', expected a whole number from 1 to 1,000,000"),
        (["--batch-size", "0"], "--batch-size: found '0', expected a whole number from 1 to 1,000,000"),
        (["--max-new-tokens", "999"], "exceeds the 32 positions of the model"),
        (["--output", "a.csv"], "--output is a.csv; expected a file ending in .parquet or .jsonl"),
        (["--output", "absent/a.jsonl"], "--output: the folder absent does not exist"),
        (["--reward", "nothing"], "expected the form module:function"),
        (["--reward", "absent_module_of_mine:f"], "There is no module 'absent_module_of_mine'"),
        (["--reward", "math:sqrt"], "The reward function 'math:sqrt' failed: TypeError"),
        (["--device", "gpu"], "device: found 'gpu'"),
        (["--base-model", "x"], "base_model is for adapter folders"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_file(
    changes: list[str], message: str, world: World, prompts: Path, tmp_path: Path, refused: Refused
) -> None:
    assert message in refused(*words(world, prompts, tmp_path / "out.jsonl"), *changes)
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("option", ["--temperature", "--max-new-tokens", "--group-size", "--batch-size"])
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(
    option: str, world: World, tmp_path: Path, refused: Refused
) -> None:
    absent = world._replace(folder=tmp_path / "absent")
    said = refused(*words(absent, tmp_path / "absent.txt", tmp_path / "out.jsonl"), option, "0")
    assert said.startswith(f"funcprobe: {option}: found '0', expected")


def test_a_prompt_that_the_tokenizer_cannot_encode_is_named(world: World, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("12=\nWhy?\n")
    said = refused(*words(world, path, tmp_path / "out.jsonl"))
    assert "prompt 1 (counted from 0): the tokenizer cannot encode 'Why?': " in said
    assert "Missing" in said
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    chat = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "12"}]}])
    with pytest.raises(InputError, match=r"prompt 0 \(counted from 0\): .*: roles must alternate\."):
        read_prompts(chat, tokenizer)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_come_as_text_or_as_ids(suffix: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    text = write(tmp_path / f"text{suffix}", [{"prompt": "12=", "other": 1}, {"prompt": "3=", "other": 2}])
    assert read_prompts(text, tokenizer) == [[ONE, TWO, EQUALS], [THREE, EQUALS]]
    ids = write(tmp_path / f"ids{suffix}", [{"prompt": "ignored", "prompt_ids": [4, 5]}])
    assert read_prompts(ids, None) == [[4, 5]]


def test_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    path = write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "12"}]}])
    with pytest.raises(InputError, match=r"prompt 0: .* has no chat template"):
        read_prompts(path, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}={% endif %}"
    assert read_prompts(path, tokenizer) == [[ONE, TWO, EQUALS]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "1", "the extension '.csv' is not known; expected .txt, .jsonl, .parquet"),
        ("a.txt", "\n\n", "the file holds no prompt"),
        ("a.txt", b"\xff\xfe", "the file is not UTF-8 text"),
        ("a.jsonl", '{"prompt": "1="}\n{', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "1="}\n', "line 1 has neither prompt_ids nor prompt"),
        ("a.jsonl", "[1]\n", "line 1 has neither prompt_ids nor prompt"),
        ("a.jsonl", '{"prompt": 3}\n', "prompt 0 (counted from 0): expected text, chat messages or token ids, found 3"),
        ("a.parquet", "no", "this is not a parquet file that can be read"),
    ],
)
def test_files_that_are_no_prompts_are_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_prompts(tmp_path / name, build_tokenizer())
    assert message in str(caught.value)


def test_a_missing_file_a_missing_column_and_text_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        read_prompts(tmp_path / "absent.txt", None)
    with pytest.raises(InputError, match="neither a column prompt_ids nor prompt"):
        read_prompts(write(tmp_path / "a.parquet", [{"text": "1="}]), None)
    (tmp_path / "a.txt").write_text("1=\n")
    with pytest.raises(InputError, match="has no tokenizer; give prompt_ids instead"):
        read_prompts(tmp_path / "a.txt", None)
