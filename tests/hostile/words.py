"""Words of a command line."""

from __future__ import annotations

from tests.hostile.room import Case, Room

HUGE = "9" * 5000
ESCAPE = "\x1b[2J\x1b[31mred\u202e"

#: Words, and what must be said of them.
_TABLE: tuple[tuple[str, str, list[str]], ...] = (
    ("a command that is none", "'runn' is no command, did you mean 'run'?", ["runn"]),
    ("no command", "the following arguments are required: COMMAND", []),
    ("a rollout file as a command", "'evaluation.parquet' is no command", ["evaluation.parquet"]),
    ("a command with an escape", "‹U+001B›", [ESCAPE]),
    ("a command of a megabyte", "is no command", ["x" * 100_000]),
    ("no configuration", "CONFIG.yaml", ["run"]),
    ("an option before the configuration", "the configuration comes first", ["run", "--lr", "1e-5", "config.yaml"]),
    (
        "a rollout file as a configuration",
        "evaluation.parquet: this is named like a file of rollouts",
        ["run", "evaluation.parquet"],
    ),
    ("rollouts as a configuration", "evaluation.jsonl", ["run", "evaluation.jsonl"]),
    ("a folder as a configuration", "checkpoint", ["run", "checkpoint"]),
    ("an empty name as a configuration", "CONFIG.yaml", ["run", ""]),
    ("a NUL in the configuration's name", "NUL", ["run", "con\0fig.yaml"]),
    ("a surrogate in the configuration's name", "there is no such file", ["run", "con\udcfffig.yaml"]),
    ("a name of a megabyte", "xxxx", ["run", "x" * 100_000]),
    ("an unknown user's configuration", "no-such-user", ["run", "~no-such-user/config.yaml"]),
    ("an endless device as a configuration", "/dev/zero", ["run", "/dev/zero"]),
    ("a full device as a configuration", "/dev/full", ["run", "/dev/full"]),
    ("another option", "--lrr", ["run", "config.yaml", "--lrr", "1"]),
    ("an option that is close", "did you mean '--influence'", ["attribute", "config.yaml", "--infuence", "prompts"]),
    ("an option of another command", "--lrs", ["run", "config.yaml", "--lrs", "1e-6"]),
    ("a word without dashes", "'lr'", ["run", "config.yaml", "lr", "1e-6"]),
    ("dashes alone", "'--'", ["run", "config.yaml", "--"]),
    ("an option without a value", "--lr has no value", ["run", "config.yaml", "--lr"]),
    ("an option twice", "--lr stands twice", ["run", "config.yaml", "--lr", "1", "--lr", "2"]),
    ("an objective without its name", "--objective.name", ["run", "config.yaml", "--objective", "dapo"]),
    ("an observable without its key", "--observable", ["run", "config.yaml", "--observable", "surprisal"]),
    ("an objective's option that is none", "objective.clip", ["run", "config.yaml", "--objective.clip", "1"]),
    ("an objective that is none", "objective.name", ["run", "config.yaml", "--objective.name", "dappo"]),
    ("an escape in an objective's name", "objective.name", ["run", "config.yaml", "--objective.name", ESCAPE]),
    ("an escape in an option", "‹U+001B›", ["run", "config.yaml", f"--{ESCAPE}", "1"]),
    ("an option of a megabyte", "unknown option", ["run", "config.yaml", f"--{'x' * 100_000}", "1"]),
    ("a value of a megabyte", "lr: found", ["run", "config.yaml", "--lr", "x" * 100_000]),
    ("a number of 5,000 digits", "lr", ["run", "config.yaml", "--lr", HUGE]),
    ("a count of 5,000 digits", "microbatch", ["run", "config.yaml", "--microbatch", HUGE]),
    ("a count beyond 64 bits", "at most 64 bits", ["run", "config.yaml", "--microbatch", str(2**70)]),
    ("a superscript as a count", "microbatch", ["run", "config.yaml", "--microbatch", "²"]),
    ("a superscript as a chunk", "--chunk", ["sweep", "config.yaml", "--lrs", "1e-6", "--chunk", "²"]),
    ("a chunk of 5,000 digits", "--chunk", ["sweep", "config.yaml", "--lrs", "1e-6", "--chunk", HUGE]),
    ("a chunk beyond any batch", "--chunk", ["sweep", "config.yaml", "--lrs", "1e-6", "--chunk", "1" + "0" * 18]),
    ("a range of a billion", "--lrs", ["sweep", "config.yaml", "--lrs", "1e-8:1e-4:1000000000"]),
    ("a range of 5,000 digits", "--lrs", ["sweep", "config.yaml", "--lrs", f"1e-8:1e-4:{HUGE}"]),
    ("a range of a superscript", "--lrs", ["sweep", "config.yaml", "--lrs", "1e-8:1e-4:²"]),
    ("a range to infinity", "--lrs", ["sweep", "config.yaml", "--lrs", "1e-8:inf:3"]),
    ("a range of texts", "--lrs", ["sweep", "config.yaml", "--lrs", "a:b:c"]),
    ("a range of four", "--lrs", ["sweep", "config.yaml", "--lrs", "1:2:3:4"]),
    ("learning rates of nothing", "--lrs", ["sweep", "config.yaml", "--lrs", ","]),
    ("a learning rate that is no number", "--lrs", ["sweep", "config.yaml", "--lrs", "nan"]),
    ("a learning rate with an underscore", "--lrs", ["sweep", "config.yaml", "--lrs", "1_0e-6"]),
    ("Arabic digits as a learning rate", "--lrs", ["sweep", "config.yaml", "--lrs", "١e-6"]),
    ("an escape among learning rates", "--lrs", ["sweep", "config.yaml", "--lrs", ESCAPE]),
    (
        "20,000 learning rates",
        "--lrs",
        ["sweep", "config.yaml", "--lrs", ",".join(f"{i}e-9" for i in range(1, 20_001))],
    ),
    ("a curve to infinity", "--lr-max", ["curve", "config.yaml", "--lr-max", "inf"]),
    ("a curve to no number", "--lr-max", ["curve", "config.yaml", "--lr-max", "nan"]),
    ("a curve to nowhere", "--lr-max", ["curve", "config.yaml", "--lr-max", "-1"]),
    ("a curve without an end", "--lr-max is missing", ["curve", "config.yaml"]),
    ("an influence of nothing", "--influence", ["attribute", "config.yaml", "--influence", "tokens"]),
    ("bars of nothing", "--bars-of", ["attribute", "config.yaml", "--bars-of", "ledgers"]),
    ("a form of nothing", "--form", ["attribute", "config.yaml", "--form", "x" * 1000]),
    ("a seed that is none", "--seed", ["demo", "--seed", "x"]),
    ("a seed of 5,000 digits", "--seed", ["demo", "--seed", HUGE]),
    ("a seed beyond 64 bits", "--seed", ["demo", "--seed", str(2**64)]),
    ("a negative seed", "--seed", ["demo", "--seed", "-1"]),
    ("a seed with an underscore", "--seed", ["demo", "--seed", "1_0"]),
    ("a demo in a file", "config.yaml", ["demo", "--dir", "config.yaml"]),
    ("a demo in a checkpoint", "checkpoint", ["demo", "--dir", "checkpoint", "--force"]),
    ("a demo of an unknown user", "no-such-user", ["demo", "--dir", "~no-such-user/x"]),
    ("a demo with a NUL", "NUL", ["demo", "--dir", "de\0mo"]),
    ("a demo with an option that is none", "did you mean '--seed'", ["demo", "--sed", "1"]),
    ("also what is none", "also", ["run", "config.yaml", "--also", "fame"]),
    ("also with an escape", "also", ["run", "config.yaml", "--also", ESCAPE]),
    ("a tracker that is none", "trackers", ["run", "config.yaml", "--trackers", "nobody"]),
    ("a device that is none", "device", ["run", "config.yaml", "--device", "toaster"]),
    ("a device that is not there", "device", ["run", "config.yaml", "--device", "cuda:99"]),
    ("meta as a device", "device", ["run", "config.yaml", "--device", "meta"]),
    ("a dtype that is none", "dtype", ["run", "config.yaml", "--dtype", "int7"]),
    ("a dtype that is a method", "dtype", ["run", "config.yaml", "--dtype", "load"]),
    ("a storage that is none", "storage", ["run", "config.yaml", "--storage", "float3"]),
)


def _case(name: str, said: str, given: list[str]) -> Case:
    def make(room: Room) -> list[str]:
        return given

    return Case(f"words: {name}", said, make)


CASES = [_case(*row) for row in _TABLE]
