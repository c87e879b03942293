"""Build wheel and sdist, and take one probe in fresh environments with the core alone, each extra, and the sdist.

`make packages` runs this; it takes minutes and is no part of `.ci/run`. An environment that cannot be made ends it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: The smallest probe: no extra is needed for it.
PROBE = """
import pathlib, torch, funcprobe as fp
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
print("funcprobe", fp.__version__, "torch", torch.__version__, "ΔH", f"{result.change:.3e}")
"""


def run(*words: str | Path, cwd: Path) -> None:
    """Run a program, or end with its exit code."""
    subprocess.run([str(word) for word in words], cwd=cwd, check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def built(folder: Path) -> tuple[Path, Path]:
    """Return wheel and sdist, built in environments of their own."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    sdist = "import hatchling.build as b, sys; b.build_sdist(sys.argv[1])"
    maker = environment(folder / "maker")
    run(maker, "-m", "pip", "install", "-q", "hatchling", cwd=folder)
    run(maker, "-c", sdist, folder, cwd=ROOT)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def environment(folder: Path) -> Path:
    """Return the interpreter of a fresh environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def tried(name: str, what: str, place: Path) -> None:
    """Install something in a fresh environment, import it there and take the smallest probe, away from the sources."""
    print(f"--- {name}", flush=True)
    python = environment(place / "env")
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", what, cwd=place)
    run(python, "-c", PROBE, cwd=place)
    run(python, "-m", "funcprobe", "--version", cwd=place)


def main() -> None:
    """Build, and try what was named, or everything."""
    extras = list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    names = ["core", "sdist", *(extra for extra in extras if extra != "dev")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names)}; all of them by default")
    chosen = parser.parse_args().names or names
    os.environ.setdefault("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))
    with tempfile.TemporaryDirectory() as made:
        wheel, sdist = built(Path(made))
        for name in chosen:
            what = {"core": str(wheel), "sdist": str(sdist)}.get(name, f"{wheel}[{name}]")
            with tempfile.TemporaryDirectory() as place:
                tried(name, what, Path(place))
    print(f"{len(chosen)} passed, 0 failed")


if __name__ == "__main__":
    main()
