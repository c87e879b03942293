"""Files of dumps: ranks of a step, pickles, tokens without a score, stamps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from funcprobe.data.files import read_metadata, write_rollouts
from funcprobe.errors import InputError
from tests.cases import dumps
from tests.cases.dumps import SEQUENCES, read, row


def test_ranks_of_a_step_are_one_batch(tmp_path: Path) -> None:
    written = dumps.prime_rl(5)
    folder = tmp_path / "step_5"
    folder.mkdir()
    for rank, line in enumerate(written.lines):
        (folder / f"rank_{rank}.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="no file STABLE"):
        read(folder)
    (folder / "STABLE").touch()
    found, notes = read(folder)
    assert len(found.ids) == 4
    assert set(notes) == {"format"}
    with pytest.raises(InputError, match="this is a folder; expected a file"):
        read(tmp_path, from_="verl")


NAN = float("nan")


def test_tokens_that_the_sampler_did_not_score(tmp_path: Path) -> None:
    written = dumps.nemo()
    written.lines[0]["generation_logprobs"][0][3] = NAN
    found, notes = read(dumps.write(tmp_path, written))
    assert row(found, 0, "sampling_logps") == [-0.5, -1.125, -0.25]  # the old policy's in its place
    assert set(notes) == {"format"}
    written = dumps.open_instruct()
    written.lines[0]["logprobs"] = [-0.5, NAN, -0.25]
    found, notes = read(dumps.write(tmp_path, written))
    assert found.sampling_logps is None
    assert "(NaN) for 1 of 8 tokens" in notes["unscored tokens"]
    written = dumps.prime_rl()
    written.lines[0]["inference_logprobs"][2] = None
    found, notes = read(dumps.write(tmp_path, written))
    assert (found.sampling_logps, found.old_logps) == (None, None)
    assert "unscored tokens" in notes


def test_several_rewards_are_named_and_none_is_taken(tmp_path: Path) -> None:
    written = dumps.ms_swift()
    (table,) = written.lines
    entries = list(table.items())
    more = dict([*entries[:3], ("Format", [1.0] * 4), *entries[3:]])
    found, notes = read(dumps.write(tmp_path, written, [more]))
    assert found.rewards is None
    assert "the columns Format, Accuracy are not read" in notes["columns"]


def test_the_stamp_goes_with_a_file(tmp_path: Path) -> None:
    found, _ = read(dumps.write(tmp_path, dumps.verl()))
    for extension in ("parquet", "jsonl"):
        path = tmp_path / f"again.{extension}"
        write_rollouts(path, found, retokenized=True)
        assert read_metadata(path)["retokenized"] is True
        again, notes = read(path)
        assert set(notes) == {"retokenized"}
        assert torch.equal(again.ids, found.ids)


def slime(change: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "rollout_id": 3,
        "samples": [
            {
                "group_index": i // 2,
                "index": i,
                "rollout_id": None,
                "prompt": "text",
                "tokens": prompt + completion,
                "response_length": len(completion),
                "reward": reward,
                "loss_mask": torch.ones(len(completion), dtype=torch.int),
                "rollout_log_probs": logps,
                "status": "completed",
                **(change or {}),
            }
            for i, (prompt, completion, reward, _, logps) in enumerate(SEQUENCES)
        ],
    }


def test_a_pickle_of_plain_containers_is_read(tmp_path: Path) -> None:
    torch.save(slime(), tmp_path / "rollout_data_3.pt")
    found, notes = read(tmp_path / "rollout_data_3.pt")
    assert set(notes) == {"format"}
    assert row(found, 0, "sampling_logps") == SEQUENCES[0][4]
    assert found.step is not None
    assert found.step.tolist() == [3] * 4
    assert found.group_ids.tolist() == [0, 0, 1, 1]


class Trap:
    """An object that would say so if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("suffix", ["pt", "pkl", "pickle", "pth"])
def test_any_other_pickle_is_refused_by_name(suffix: str, tmp_path: Path) -> None:
    import pickle

    path = tmp_path / f"rollouts.{suffix}"
    if suffix in ("pt", "pth"):
        torch.save(slime({"status": Trap()}), path)
    else:
        path.write_bytes(pickle.dumps({"samples": [Trap()]}))
    with pytest.raises(InputError, match=r"slime's \.pt and SkyRL's \.pkl are pickles") as caught:
        read(path)
    assert str(path) in str(caught.value)
