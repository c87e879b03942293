"""Options of a command, declared once: what they take, how they are refused, how they are told."""

from __future__ import annotations

import pytest

from funcprobe.cli.options import Option, Parser, described, parsed, split, usage_of
from funcprobe.errors import ConfigError, InputError


def positive(text: str) -> float:
    if (value := float(text)) <= 0:
        raise InputError(f"{value:g} is not above 0.")
    return value


RATE = Option("rate", "X", "how fast", read=positive, expected="a number, such as 3", required=True)
WAY = Option("the-way", "slow|fast", "how", default="slow", choices=("slow", "fast"))
ROWS = Option("rows", "a,b", "which", default=(), choices=("a", "b", "c"), several=True)
OPTIONS = (RATE, WAY, ROWS)


def test_own_options_are_taken_out_and_the_rest_is_left_in_order() -> None:
    found, rest = split(["--lr", "1", "--rate=2", "--order", "1", "--rows", "a, c", "--the-way", "fast"], OPTIONS)
    assert vars(found) == {"rate": 2.0, "the_way": "fast", "rows": ("a", "c")}
    assert rest == ["--lr", "1", "--order", "1"]
    assert vars(split(["--rate", "3"], OPTIONS)[0]) == {"rate": 3.0, "the_way": "slow", "rows": ()}
    assert split(["--rate=-0.5"], (Option("rate", "X", "", read=float),))[0].rate == -0.5
    assert split(["--rate", "-0.5"], (Option("rate", "X", "", read=float),))[0].rate == -0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--rate is missing; give a number, such as 3."),
        (["--rate"], "--rate has no value; write --rate VALUE."),
        (["--rate", "--the-way", "fast"], "--rate has no value; write --rate VALUE."),
        (["--rate", "1", "--the-way"], "--the-way has no value; write --the-way fast."),
        (["--rate", "1", "--rate=2"], "--rate stands twice; give it once."),
        (["--rate", "quick"], "--rate: found 'quick', expected a number, such as 3."),
        (["--rate", "0"], "--rate: 0 is not above 0."),
        (["--rate", "1", "--the-way", "middling"], "--the-way: found 'middling', expected slow or fast."),
        (["--rate", "1", "--rows", "a,d,e"], "--rows: found 'd', expected a, b or c."),
    ],
)
def test_wrong_words_are_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split(words, OPTIONS)
    assert str(caught.value) == message


def test_they_are_told_with_their_defaults() -> None:
    assert described(OPTIONS).splitlines() == [
        "  --rate X              required: how fast",
        "  --the-way slow|fast   how (default: slow)",
        "  --rows a,b            which",
    ]
    assert usage_of("go", OPTIONS) == (
        "funcprobe go CONFIG.yaml --rate X [--the-way slow|fast] [--rows a,b]\n                    [--key value ...]"
    )
    long = Option("long", "N", "words " * 40)
    assert max(map(len, described([long]).splitlines())) <= 88
    assert described([]) == ""


def test_the_same_options_serve_a_command_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    found = parsed(Parser(prog="go"), ["--rate", "2"], (), (RATE, WAY))
    assert (found.rate, found.the_way) == (2.0, "slow")
    with pytest.raises(ConfigError, match=r"required: --rate; see go --help"):
        parsed(Parser(prog="go"), [], (), (RATE,))
    with pytest.raises(SystemExit):
        parsed(Parser(prog="go"), ["--help"], (), (RATE, WAY))
    assert "how (default: slow)" in capsys.readouterr().out
