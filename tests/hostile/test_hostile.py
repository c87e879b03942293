"""Every case of the catalogue ends with exit code 2 and one calm line, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.catalogue import CASES
from tests.hostile.judge import Outcome, judged

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def ask() -> Iterator[Callable[[str], Outcome]]:
    """A warm process that knows what becomes of a case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.warm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def asked(name: str) -> Outcome:
            print(name, file=process.stdin, flush=True)
            return Outcome(*json.loads(process.stdout.readline()))  # type: ignore[union-attr]

        yield asked
        process.stdin.close()


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_calm_line(name: str, ask: Callable[[str], Outcome]) -> None:
    outcome = ask(name)
    assert judged(outcome, CASES[name].said) == [], outcome


def test_the_catalogue_is_of_some_size() -> None:
    assert len(CASES) >= 300


CALM = Outcome(2, "", "funcprobe: config.yaml: lr: found 'abc', expected a number.\n", [], [], 0.1)

WORSE = {
    "another code": (CALM._replace(code=1), "ended with 1"),
    "a traceback": (CALM._replace(err="funcprobe: lr\nTraceback (most recent call last):\n"), "a traceback"),
    "many lines": (CALM._replace(err="funcprobe: lr\n\n\n\n"), "4 lines"),
    "a long line": (CALM._replace(err=f"funcprobe: lr {'x' * 400}\n"), "characters"),
    "no name": (CALM._replace(err="funcprobe: something is wrong.\n"), "does not say 'lr'"),
    "an escape": (CALM._replace(err="funcprobe: lr \x1b[31m\n"), "lets U+001B through"),
    "a file": (CALM._replace(changed=["checkpoint/config.json"]), "changed ['checkpoint/config.json']"),
    "a payload": (CALM._replace(executed=["executed"]), "executed"),
    "output": (CALM._replace(out="Results"), "alone"),
}


@pytest.mark.parametrize("worse", WORSE)
def test_the_judge_sees_what_is_wrong(worse: str) -> None:
    outcome, said = WORSE[worse]
    assert judged(CALM, "lr") == []
    assert any(said in problem for problem in judged(outcome, "lr"))
