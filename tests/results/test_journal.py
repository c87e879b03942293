"""A sweep that was killed goes on from where it was, and never from where another one was."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import funcprobe as fp
from funcprobe.errors import InputError
from funcprobe.results.sweep import SweepResult
from tests.cases import models
from tests.cases.identities import case, identity_with, nudged
from tests.cases.probes import Case, E, Offset, U, prompted

LRS = [1e-5, 1e-4, 1e-3, 1e-2]


class KilledError(Exception):
    """What a test stops a sweep with."""


def killed(after: int) -> Callable[[str, int, int], None]:
    """Return a progress callback that kills the sweep when `after` learning rates are scored and one more begins."""
    scored = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal scored
        scored += what == "E at θ′"
        if scored > after:
            raise KilledError

    return progress


def content(result: SweepResult) -> dict[str, Any]:
    """Return all of a result but how long it took."""
    provenance = dataclasses.replace(result.provenance, timings={})
    return dataclasses.replace(result, provenance=provenance).to_dict()


OPTIONS: list[dict[str, Any]] = [
    {"observables": {"entropy": fp.entropy(), "reward": fp.expected_reward()}, "order": 2},
    {"mode": "reverse", "order": 1},
    {"bars": "bootstrap", "seed": 4, "order": 1},
]


@pytest.mark.parametrize(("options", "after"), [(OPTIONS[0], 1), (OPTIONS[1], 0), (OPTIONS[1], 3), (OPTIONS[2], 2)])
def test_a_killed_sweep_goes_on_and_ends_as_if_nothing_had_been(
    options: dict[str, Any], after: int, tmp_path: Path
) -> None:
    journal = tmp_path / "new folder" / "journal.jsonl"
    options = {"method": "difference", **options}
    with pytest.raises(KilledError):
        case().sweep(LRS, journal=journal, progress=killed(after), **options)
    seen: list[str] = []
    result = case().watched(seen).sweep(LRS, journal=journal, **options)
    # the derivative is taken again; of the learning rates only those that were not finished
    assert seen.count("E") == 1 + len(LRS) - after
    whole = case().sweep(LRS, **options)
    assert content(result) == content(whole)
    assert result.slope() == whole.slope()
    seen.clear()
    assert content(case().watched(seen).sweep(LRS, journal=journal, chunk=3, **options)) == content(whole)
    assert seen.count("E") == 1


def test_what_an_unusual_optimizer_made_is_noted_after_a_kill_too(tmp_path: Path) -> None:
    c, journal = Case(optimizer=Offset()), tmp_path / "journal"
    with pytest.raises(KilledError):
        c.sweep(LRS, journal=journal, progress=killed(3), order=1, bars=None, method="difference")
    result = c.sweep(LRS, journal=journal, order=1, bars=None, method="difference")
    assert content(result) == content(c.sweep(LRS, order=1, bars=None, method="difference"))
    assert "not proportional" in result.notes[0]


QUICK: dict[str, Any] = {"method": "difference", "order": 1, "bars": None}


@functools.cache
def finished() -> tuple[bytes, dict[str, Any]]:
    """Return a whole journal, and what its sweep found."""
    path = Path(os.environ["FUNCPROBE_TEST_JOURNAL"])
    result = case().sweep(LRS, journal=path, **QUICK)
    return path.read_bytes(), content(result)


@pytest.fixture(autouse=True, scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNCPROBE_TEST_JOURNAL", str(tmp_path_factory.mktemp("journal") / "whole"))
        yield


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_a_journal_cut_off_anywhere_is_a_journal(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    whole, expected = finished()
    path = tmp_path_factory.mktemp("cut") / "journal"
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    assert content(case().sweep(LRS, journal=path, **QUICK)) == expected
    # and what is left is whole again: every line reads, no finished point stands twice
    assert sorted(json.loads(line)["line"]["point"]["lr"] for line in path.read_text().splitlines()[1:]) == LRS


@pytest.mark.parametrize("cut", [0, 1, 30, 60, 120])
def test_a_first_line_that_was_cut_off_is_written_anew(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(finished()[0][:cut])
    assert content(case().sweep(LRS, journal=path, **QUICK)) == finished()[1]
    assert path.read_bytes() == finished()[0]


def test_the_same_journal_serves_more_learning_rates(tmp_path: Path) -> None:
    path, seen = tmp_path / "journal", []
    case().sweep([1e-4, 1e-2], journal=path, **QUICK)
    more = case().watched(seen).sweep([1e-5, 1e-4, 1e-3, 1e-2, 1e-1], journal=path, ess_threshold=0.1, **QUICK)
    assert seen.count("E") == 1 + 3
    for found, expected in zip(more.readings(), case().sweep(more.lrs, **QUICK).readings(), strict=True):
        assert found.change == expected.change
        # one derivative was scaled down from 1e-1 and another from 1e-2
        assert found.first_order == pytest.approx(expected.first_order, rel=1e-9)
    seen.clear()
    assert case().watched(seen).sweep([1e-4], journal=path, **QUICK).lrs == (1e-4,)
    assert seen.count("E") == 1


def test_microbatches_and_chunks_may_change(tmp_path: Path) -> None:
    path, seen = tmp_path / "journal", []
    case().sweep(LRS[:2], journal=path, **QUICK)
    case().watched(seen).sweep(LRS, journal=path, chunk=2, microbatch=fp.TokenBudget(10**6), **QUICK)
    assert seen.count("E") == 1 + 1


def others() -> dict[str, dict[str, Any]]:
    """Return, by name, what another sweep may have that this one has not."""
    c = case()
    leaf = next(iter(c.params))

    def step(objective: Any = None, optimizer: Any = None, max_grad_norm: float | None = 1.0) -> Any:
        return fp.make_step(c.policy, objective or fp.grpo(), optimizer or c.optimizer, max_grad_norm)

    assert E.rewards is not None
    return {
        "params": {"params": nudged(c.params, leaf)},
        "optimizer state": {"state": {**c.state, leaf: nudged(c.state[leaf], "exp_avg")}},
        "evaluation": {"evaluation": prompted(5, 2, seed=3)},
        "a reward": {"evaluation": E._replace(rewards=E.rewards + 1e-9)},
        "weights": {"evaluation": E._replace(weight=2 * E.weight)},
        "batch": {"batch": prompted(3, 4, seed=3, first=50)},
        "observable": {"observables": fp.entropy(per="sequence")},
        "a second observable": {"observables": {"entropy": fp.entropy(), "kl": fp.kl()}},
        "another name": {"observables": {"joy": fp.entropy()}},
        "objective": {"step": step(fp.dapo())},
        "an option of the objective": {"step": step(fp.grpo(epsilon=0.1))},
        "optimizer": {"step": step(optimizer=fp.adamw(1e-3, weight_decay=0.1, eps=1e-7))},
        "clipping": {"step": step(max_grad_norm=0.5)},
        "no clipping": {"step": step(max_grad_norm=None)},
        "mode": {"mode": "reverse"},
        "order": {"order": 2},
        "bars": {"bars": "jackknife"},
        "level": {"level": 0.9},
        "tolerance": {"tolerance": 1e-6},
        "seed": {"seed": 1},
    }


@pytest.mark.parametrize("what", others())
def test_the_journal_of_another_sweep_is_refused(what: str, tmp_path: Path) -> None:
    path, seen = tmp_path / "journal", []
    path.write_bytes(finished()[0])
    options = {**QUICK, **others()[what]}
    if "step" not in options:
        options["step"] = case().watched(seen).step
    with pytest.raises(InputError, match=r"journal belongs to another sweep: parameters, rollouts, .* options differ"):
        case().sweep(LRS, journal=path, **options)
    assert seen == []  # before the gradient is paid for
    assert path.read_bytes() == finished()[0]


def test_the_journal_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    line = {"title": "funcprobe sweep, journal 5", "identity": "0" * 64, "gradient_norm": 1.0}
    digest = hashlib.sha256(json.dumps(line).encode()).hexdigest()
    path.write_text(before := json.dumps({"line": line, "sha256": digest}) + "\n")
    with pytest.raises(InputError, match=r"journal was written by another version .* 'funcprobe sweep, journal 5'"):
        case().sweep(LRS, journal=path, **QUICK)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "garbage", [b"dear diary\n", b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\x00PK\x03\n\x80", b"\x80abc"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(garbage)
    with pytest.raises(InputError, match=r"notes.txt is not the journal of a sweep; give the name of a new file"):
        case().sweep(LRS, journal=path, **QUICK)
    assert path.read_bytes() == garbage
    with pytest.raises(InputError, match=r"is a folder; a journal is a file, so give the name of one"):
        case().sweep(LRS, journal=tmp_path, **QUICK)


@pytest.mark.parametrize("damage", [b"{", b"3", b"[]", b"null", b'{"lr": 1e-5}'])
def test_damage_before_the_end_is_said(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = finished()[0].split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=r"journal is damaged \(.+\); delete it to begin anew"):
        case().sweep(LRS, journal=path, **QUICK)


def altered(lines: list[bytes]) -> list[bytes]:
    """Return the lines with a digit of a finished point changed: still JSON, still a journal in form."""
    place = lines[-2].index(b'"lr": ') + len(b'"lr": ')
    digit = b"2" if lines[-2][place : place + 1] != b"2" else b"3"
    return [*lines[:-2], lines[-2][:place] + digit + lines[-2][place + 1 :], lines[-1]]


def test_a_journal_that_was_altered_or_lost_its_head_is_never_believed(tmp_path: Path) -> None:
    path, lines = tmp_path / "journal", finished()[0].split(b"\n")
    path.write_bytes(b"\n".join(altered(lines)))
    with pytest.raises(InputError, match=r"journal is damaged \(a line has been altered\); delete it to begin anew"):
        case().sweep(LRS, journal=path, **QUICK)
    path.write_bytes(b"\n".join(lines[1:]))
    with pytest.raises(InputError, match=r"journal is not the journal of a sweep; give the name of a new file"):
        case().sweep(LRS, journal=path, **QUICK)


def test_two_processes_never_write_one_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(finished()[0])
    holder = (
        f"import fcntl, sys; f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="journal is being written by another sweep; wait for it, or give another"):
            case().sweep(LRS, journal=path, **QUICK)
        process.communicate()
    assert content(case().sweep(LRS, journal=path, **QUICK)) == finished()[1]


def test_frozen_weights_are_part_of_the_model(tmp_path: Path) -> None:
    def adapted(scale: float) -> tuple[fp.Policy, Any]:
        module = models.lora(torch.float64)
        with torch.no_grad():
            for name, leaf in module.named_parameters():
                if not leaf.requires_grad and "proj" in name:
                    leaf.mul_(scale)
        return fp.from_module(module)

    def run(scale: float) -> SweepResult:
        policy, params = adapted(scale)
        step = fp.make_step(policy, fp.grpo(), fp.sgd(1e-3))
        state = fp.sgd(1e-3).init(params)
        return fp.sweep(
            fp.Update.from_step(step, params, state, U), E, [1e-4, 1e-3], journal=tmp_path / "journal", **QUICK
        )

    run(1.0)
    assert len(run(1.0).points) == 2
    with pytest.raises(InputError, match=r"belongs to a sweep of another model: its gradient on the batch has"):
        run(1.5)


def test_identity_leaves_what_it_reads_alone() -> None:
    c = case()
    before = [p.clone() for p in c.params.values()]
    state = torch.get_rng_state()
    identity_with(fp.entropy())
    assert all(torch.equal(p, q) for p, q in zip(before, c.params.values(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_journal_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    case().sweep(LRS, **QUICK)
    assert list(tmp_path.iterdir()) == []
