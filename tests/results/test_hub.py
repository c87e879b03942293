"""Results on the Hub: pushed in one commit and read back, by the real client, from a stand-in on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import funcprobe as fp
from funcprobe.errors import InputError, MissingExtraError
from funcprobe.results.hub import Address
from funcprobe.results.storage import ARRAYS, FILES, NUMBERS
from tests.cases.hub import TOKEN, Hub, hub, running
from tests.cases.kept import same
from tests.cases.written_results import RESULTS

__all__ = ["hub"]  # a fixture

#: The client uploads large files with an argument that its own HTTP library has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "me/results"


def pushed(kind: str = "sweep", path: str = "", **options: Any) -> str:
    address: str = RESULTS[kind].push_to_hub(REPO, path, token=TOKEN, **options)
    return address


@pytest.mark.parametrize("kind", RESULTS)
def test_what_is_read_is_what_was_pushed_in_one_commit(kind: str, hub: Hub) -> None:
    address = pushed(kind, "runs/one")
    assert address == f"hf://datasets/{REPO}@{hub.branches[REPO]['main']}/runs/one"
    assert sum("/commit/" in line for line in hub.requests) == 1
    names = {NUMBERS, ARRAYS} if ARRAYS in str(hub.files(REPO)) else {NUMBERS}
    assert hub.files(REPO).keys() == {".gitattributes", *(f"runs/one/{name}" for name in names)}
    for found in (fp.load(address), type(RESULTS[kind]).load(f"hf://datasets/{REPO}/runs/one")):
        assert same(found, RESULTS[kind])


def test_a_new_repository_is_private_and_an_old_one_stays_as_it_is(hub: Hub) -> None:
    pushed()
    assert hub.private[REPO]
    pushed("probe", "other", private=False)
    assert hub.private[REPO]
    RESULTS["probe"].push_to_hub("me/public", private=False, token=TOKEN)
    assert not hub.private["me/public"]


def test_an_address_with_a_commit_names_the_same_numbers_for_ever(hub: Hub) -> None:
    first = pushed("sweep")
    second = pushed("probe")
    assert (fp.load(first).kind, fp.load(second).kind) == ("sweep", "probe")
    assert fp.load(f"hf://datasets/{REPO}").kind == "probe"  # of the sweep's arrays, still there, nothing is read
    hub.branches[REPO]["try/one"] = hub.branches[REPO]["main"]
    third = pushed("comparison", revision="try/one")
    assert fp.load(f"hf://datasets/{REPO}@try%2Fone").kind == fp.load(third).kind == "comparison"
    assert fp.load(f"hf://datasets/{REPO}").kind == "probe"


def test_only_files_of_the_format_are_fetched(hub: Hub) -> None:
    pushed(path="one")
    hub.commit(
        REPO, "main", {**hub.files(REPO), "one/hook.py": b"1/0", "result.json": b"{}", "one/sub/result.json": b""}
    )
    hub.requests.clear()
    fp.load(f"hf://datasets/{REPO}/one")
    fetched = {line.rpartition("/resolve/")[2].partition("/")[2] for line in hub.requests if "/resolve/" in line}
    assert fetched == {f"one/{name}" for name in FILES}


def test_a_path_is_no_pattern(hub: Hub) -> None:
    pushed("probe", "[ab]*")
    hub.commit(REPO, "main", {**hub.files(REPO), "a/result.json": b"{}"})
    hub.requests.clear()
    assert fp.load(f"hf://datasets/{REPO}/[ab]*").kind == "probe"
    assert not any(line.endswith("/a/result.json") for line in hub.requests)


def test_what_is_damaged_or_of_another_kind_is_refused_as_from_any_folder(hub: Hub) -> None:
    address = pushed("sweep")
    with pytest.raises(InputError, match="a result of kind 'sweep', and one of kind 'probe' was asked for"):
        fp.ProbeResult.load(address)
    files = hub.files(REPO)
    hub.commit(REPO, "main", {**files, ARRAYS: files[ARRAYS][:-1] + b"!"})
    with pytest.raises(InputError, match=f"{ARRAYS} is not the file that {NUMBERS} was saved with"):
        fp.load(f"hf://datasets/{REPO}")
    hub.commit(REPO, "main", {name: x for name, x in files.items() if name != ARRAYS})
    with pytest.raises(InputError, match=f"holds no {ARRAYS}"):
        fp.load(f"hf://datasets/{REPO}")
    hub.commit(REPO, "main", {**files, NUMBERS: json.dumps({"schema_version": 3, "kind": "x"}).encode()})
    with pytest.raises(InputError, match="a result of kind 'x'; this funcprobe reads"):
        fp.load(f"hf://datasets/{REPO}")


def test_what_is_not_there_is_said(hub: Hub) -> None:
    pushed()
    with pytest.raises(InputError, match=r"datasets/me/nothing cannot be read: there is none, or the token may not"):
        fp.load("hf://datasets/me/nothing")
    with pytest.raises(InputError, match=r"results@v9 cannot be read: the repository has no such revision"):
        fp.load(f"hf://datasets/{REPO}@v9")
    with pytest.raises(InputError, match=r"results@v9 cannot be written: the repository has no such revision"):
        pushed(revision="v9")
    with pytest.raises(InputError, match=r"results/deeper holds no result.json; expected a folder that push_to_hub"):
        fp.load(f"hf://datasets/{REPO}/deeper")
    with pytest.raises(InputError, match=r"cannot be written: the token is missing, or may not write there; log in"):
        RESULTS["probe"].push_to_hub(REPO)


def test_offline_nothing_is_asked_and_what_was_fetched_is_still_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    address = pushed()
    fp.load(f"hf://datasets/{REPO}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(fp.load(f"hf://datasets/{REPO}"), RESULTS["sweep"])
    assert same(fp.load(address), RESULTS["sweep"])
    with pytest.raises(
        InputError, match=r"other cannot be read: the Hub is out of reach, or HF_HUB_OFFLINE is set, and"
    ):
        fp.load("hf://datasets/me/other")
    with pytest.raises(
        InputError, match=r"results cannot be written: HF_HUB_OFFLINE is set; unset it to use the network"
    ):
        pushed()
    assert hub.requests == []


@pytest.mark.parametrize(
    "repo", ["results", "me/", "me/a/b", "me/re sults", "me/a..b", "me/a--b", ".me/x", "me/-x", ""]
)
def test_a_name_that_no_repository_has_is_refused_before_anything_is_asked(repo: str, hub: Hub) -> None:
    with pytest.raises(InputError, match="is no name of a dataset repository; expected owner/name"):
        RESULTS["probe"].push_to_hub(repo, token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize("path", ["../up", "a//b", "a/./b", "a\\b"])
def test_a_path_that_leads_elsewhere_is_refused(path: str, hub: Hub) -> None:
    with pytest.raises(InputError, match="is no path in a repository"):
        RESULTS["probe"].push_to_hub(REPO, path, token=TOKEN)
    assert hub.requests == []


@pytest.mark.parametrize(
    "text", ["hf://me/results", "hf://models/me/x", "hf://datasets/me", "hf://datasets/me/x@", "hf://"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is no address; expected hf://datasets/owner/name\[@revision\]\[/path\]"):
        fp.load(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hf://datasets/me/x", Address("me/x")),
        ("hf://datasets/me/x@v1.0/a/b", Address("me/x", "a/b", "v1.0")),
        ("hf://datasets/me/x@refs%2Fpr%2F3", Address("me/x", "", "refs/pr/3")),
    ],
)
def test_an_address_is_written_as_it_is_read(text: str, address: Address) -> None:
    assert Address.of(text) == address
    assert str(address) == text
    assert Address.of("hf://datasets/me/x@refs/pr/3/a/") == Address("me/x", "a", "refs/pr/3")


def test_a_program_is_pointed_at_a_hub_by_the_environment(tmp_path: Path) -> None:
    code = f"""
import funcprobe as fp
result = fp.load({str(tmp_path / "one")!r})
print(result.push_to_hub({REPO!r}, "one", token={TOKEN!r}))
assert fp.load("hf://datasets/{REPO}/one") == result
"""
    RESULTS["probe"].save(tmp_path / "one")
    with running() as found:
        own = {
            "HF_ENDPOINT": found.endpoint,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"hf://datasets/{REPO}@{found.branches[REPO]['main']}/one"


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: pushed(), lambda: fp.load(f"hf://datasets/{REPO}")):
        with pytest.raises(MissingExtraError, match=r"needs the package 'huggingface_hub', .*funcprobe\[hub\]"):
            call()
