"""Outputs: folders and files of somebody else, inputs, and what earlier runs left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from tests.hostile.room import Case, Room

FORCE = ["run", "config.yaml", "--force"]


def _made(*files: str, folder: str = "results") -> Callable[[Room], list[str]]:
    def make(room: Room) -> list[str]:
        for name in files:
            room.write(f"{folder}/{name}", "years of work")
        return FORCE

    return make


def _marked(room: Room, files: object) -> None:
    room.write("results/.funcprobe.json", json.dumps({"funcprobe": 1, "files": files}))


def _folder_as_file(room: Room) -> list[str]:
    room.write("results/result.json/thesis.tex", "years")
    return FORCE


def _lying_marker(room: Room) -> list[str]:
    room.write("results/thesis.tex", "years")
    _marked(room, {"thesis.tex": "0" * 64})
    return FORCE


def _nested_marker(room: Room) -> list[str]:
    room.write("results/.funcprobe.json", "[" * 100_000)
    room.write("results/thesis.tex", "years")
    return FORCE


def _linked(room: Room) -> list[str]:
    room.write("mine/thesis.tex", "years")
    (room.folder / "results").symlink_to("mine")
    return FORCE


def _words(*words: str) -> Callable[[Room], list[str]]:
    return lambda room: ["run", "config.yaml", *words]


def _sampled(*words: str) -> Callable[[Room], list[str]]:
    return lambda room: ["sample", "checkpoint", "prompts.txt", "--temperature", "1", *words]


def _read_only(room: Room) -> list[str]:
    room.path("closed/x").parent.chmod(0o555)
    return ["run", "config.yaml", "--output", "/proc/results"]


def _journal(text: str | bytes) -> Callable[[Room], list[str]]:
    def make(room: Room) -> list[str]:
        room.write("results-sweep.unfinished.jsonl", text)
        return ["sweep", "config.yaml", "--lrs", "1e-6"]

    return make


def _journal_folder(room: Room) -> list[str]:
    room.path("results-sweep.unfinished.jsonl/x")
    return ["sweep", "config.yaml", "--lrs", "1e-6"]


def _journal_fifo(room: Room) -> list[str]:
    os.mkfifo(room.folder / "results-sweep.unfinished.jsonl")
    return ["sweep", "config.yaml", "--lrs", "1e-6"]


_HEAD = {"title": "funcprobe sweep, journal 6", "identity": "0" * 64, "gradient_norm": 1.0}

CASES = [
    Case("place: a folder of somebody else", "'thesis.tex', which funcprobe did not write", _made("thesis.tex")),
    Case("place: a lone config.yaml", "'config.yaml', which funcprobe did not write", _made("config.yaml")),
    Case("place: files under our names", "which funcprobe did not write", _made("result.json", "summary.txt")),
    Case("place: a hidden file", "'.git/HEAD'" if False else "'.git'", _made(".git/HEAD")),
    Case("place: a folder under a file's name", "'result.json'", _folder_as_file),
    Case("place: a marker that lies", "has changed since", _lying_marker),
    Case("place: a marker nested deeply", "'thesis.tex'", _nested_marker),
    Case("place: a link to somebody's folder", "'thesis.tex'", _linked),
    Case("place: results without force", "exists already", lambda r: _made("x")(r)[:2]),
    Case("place: the folder of everything", "batch.jsonl", _words("--output", ".", "--force")),
    Case("place: the checkpoint", "checkpoint", _words("--output", "checkpoint", "--force")),
    Case("place: the evaluation", "evaluation.jsonl is a file", _words("--output", "evaluation.jsonl", "--force")),
    Case("place: below a file", "evaluation.jsonl", _words("--output", "evaluation.jsonl/results")),
    Case("place: where nobody may write", "/proc", _read_only),
    Case("place: the root", "output: /", _words("--output", "/", "--force")),
    Case("place: a name too long", "File name too long", _words("--output", "x" * 300)),
    Case("place: a device", "/dev/null", _words("--output", "/dev/null", "--force")),
    Case(
        "place: an escape",
        "‹U+001B›",
        lambda r: (r.write("\x1b[31m/a", ""), _words("--output", "\x1b[31m", "--force")(r))[1],
    ),
    Case(
        "place: samples over the prompts",
        "prompts",
        lambda r: [
            *(_sampled("--output", "prompts.jsonl", "--force")(r)[:2]),
            str(r.write("prompts.jsonl", '{"prompt": "31="}\n').name),
            *_sampled("--output", "prompts.jsonl", "--force")(r)[3:],
        ],
    ),
    Case("place: samples that are there", "evaluation.jsonl exists already", _sampled("--output", "evaluation.jsonl")),
    Case(
        "place: samples in a folder",
        "exists already",
        lambda r: (r.path("drawn.jsonl/x"), _sampled("--output", "drawn.jsonl", "--force")(r))[1],
    ),
    Case("place: samples of another suffix", "--output", _sampled("--output", "drawn.csv")),
    Case("place: samples below nowhere", "--output", _sampled("--output", "nowhere/drawn.jsonl")),
    Case("place: samples with a NUL", "--output", _sampled("--output", "dr\0awn.jsonl")),
    Case("place: samples of an unknown user", "no-such-user", _sampled("--output", "~no-such-user/drawn.jsonl")),
    Case("journal: a diary", "is not the journal of a sweep", _journal("dear diary\n")),
    Case("journal: an object", "is not the journal of a sweep", _journal("{}\n")),
    Case("journal: binary", "is not the journal of a sweep", _journal(bytes(range(256)))),
    Case("journal: nested deeply", "is not the journal of a sweep", _journal("[" * 100_000 + "\n")),
    Case("journal: without a checksum", "is not the journal of a sweep", _journal(json.dumps(_HEAD) + "\n")),
    Case(
        "journal: a wrong checksum", "is not the journal", _journal(json.dumps({"line": _HEAD, "sha256": "0"}) + "\n")
    ),
    Case("journal: a folder", "is a folder", _journal_folder),
    Case("journal: a FIFO", "is no ordinary file", _journal_fifo),
]
