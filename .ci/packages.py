"""Build wheel and sdist, and take a probe in fresh environments: the core, each extra, other Pythons and torches.

`make packages` runs this; it takes minutes and is no part of `.ci/run`. An environment that cannot be made ends it. A
Python that is not on this machine is named and left out. The registry has no CPU build of torch for Linux on x86-64:
another torch than the pinned one, or another Python than the one whose build lies at hand, brings gigabytes of CUDA;
every trial says which build it had.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

#: Supported Pythons, and torches: the oldest, and whichever is the newest.
PYTHONS = ("3.11", "3.12", "3.13")
TORCHES: Mapping[str, str] = {"oldest-torch": "torch==2.8.*", "newest-torch": "torch"}

#: The smallest probe: no extra is needed for it.
PROBE = """
import pathlib, platform, torch, funcprobe as fp
_ = torch.manual_seed(0)
policy, params = fp.from_module(torch.nn.Sequential(torch.nn.Embedding(20, 4), torch.nn.Linear(4, 20)).double())
draw = torch.Generator().manual_seed(1)
E, U = (
    fp.sample(policy, params, [[5, 6], [7]], group_size=4, generator=draw, temperature=1.0, max_new_tokens=3, eos_id=0,
              reward=lambda prompts, completions: [float(len(set(c))) for c in completions])
    for _ in range(2)
)
step = fp.make_step(policy, fp.grpo(), fp.sgd(1e-3))
result = fp.probe(fp.Update.from_step(step, params, step.optimizer.init(params), U), E)
assert abs(result.change - result.first_order) <= 0.1 * abs(result.first_order), result.summary()
assert pathlib.Path(fp.__file__).with_name("py.typed").exists()
build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
print("python", platform.python_version(), "torch", torch.__version__, f"({build})", "ΔH", f"{result.change:.3e}")
"""

#: The use of an extra, after the probe.
USES = {
    "app": "assert len(result.to_frame()) == len(result.to_frame(library='arrow'))",
    "polars": "assert result.to_frame(library='polars').columns[0] == 'lr'",
    "arviz": """
import arviz_stats
assert arviz_stats.hdi(result.to_datatree()["replicates"], group=result.observable.replace("/", "."), dim="prompt")
""",
    "hub": """
try:
    result.push_to_hub("someone/results")
except fp.errors.InputError as error:
    assert "HF_HUB_OFFLINE is set" in str(error), error
else:
    raise AssertionError("a push that nobody allowed")
""",
}


class Trial(NamedTuple):
    """One fresh environment."""

    what: str  #: that is installed
    python: str = ""  #: of this version; "" is the one that runs this
    torch: str = ""  #: instead of the pinned one
    use: str = ""  #: beside the probe


def run(*words: str | Path, cwd: Path, **environment: str) -> None:
    """Run a program, or end with its exit code."""
    own = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", **environment}
    subprocess.run([str(word) for word in words], cwd=cwd, check=True, env=own)


def built(folder: Path) -> tuple[Path, Path]:
    """Return wheel and sdist, built in environments of their own."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    sdist = "import hatchling.build as b, sys; b.build_sdist(sys.argv[1])"
    maker = environment(folder / "maker", sys.executable)
    run(maker, "-m", "pip", "install", "-q", "hatchling", cwd=folder)
    run(maker, "-c", sdist, folder, cwd=ROOT)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def environment(folder: Path, python: str) -> Path:
    """Return the interpreter of a fresh environment."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def trials(wheel: Path, sdist: Path, extras: list[str]) -> dict[str, Trial]:
    """Return every trial by its name."""
    return {
        "core": Trial(str(wheel)),
        "sdist": Trial(str(sdist)),
        **{extra: Trial(f"{wheel}[{extra}]", use=USES.get(extra, "")) for extra in extras},
        **{f"python{version}": Trial(str(wheel), python=version) for version in PYTHONS},
        **{name: Trial(str(wheel), torch=torch) for name, torch in TORCHES.items()},
    }


def interpreter(version: str) -> str | None:
    """Return an interpreter of a version that runs on this machine; None where there is none."""
    for candidate in filter(None, [sys.executable, *candidates(version)]):
        says = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", says], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def candidates(version: str) -> Iterator[str | None]:
    """Yield places where an interpreter of a version may be: on the path, of pyenv, of uv."""
    yield shutil.which(f"python{version}")
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(root.glob(f"versions/{version}.*/bin/python"), reverse=True))
    if uv := shutil.which("uv"):
        done = subprocess.run([uv, "python", "find", "--offline", version], capture_output=True, text=True)
        yield done.stdout.strip()


def tried(name: str, trial: Trial, place: Path) -> bool:
    """Install something in a fresh environment, import it there and take the smallest probe, away from the sources."""
    own = sys.executable if not trial.python else interpreter(trial.python)
    if own is None:
        print(f"--- {name}: there is no Python {trial.python} on this machine", flush=True)
        return False
    print(f"--- {name}", flush=True)
    python = environment(place / "env", own)
    constraints = CONSTRAINTS.read_text()
    if trial.torch:
        constraints = re.sub(r"^torch==.*$", trial.torch, constraints, flags=re.MULTILINE)
    (place / "constraints.txt").write_text(constraints)
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", trial.what)
    run(*pip, cwd=place, PIP_CONSTRAINT=str(place / "constraints.txt"))
    run(python, "-c", f"{PROBE}\n{trial.use}", cwd=place)
    run(python, "-m", "funcprobe", "--version", cwd=place)
    return True


def main() -> None:
    """Build, and try what was named, or everything."""
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    extras.remove("dev")
    names = list(trials(Path(), Path(), extras))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}; all of them by default")
    chosen = parser.parse_args().names or names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"unknown {unknown[0]}; expected some of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as made:
        every = trials(*built(Path(made)), extras)
        passed = 0
        for name in chosen:
            with tempfile.TemporaryDirectory() as place:
                passed += tried(name, every[name], Path(place))
    print(f"{passed} passed, 0 failed, {len(chosen) - passed} skipped")


if __name__ == "__main__":
    main()
