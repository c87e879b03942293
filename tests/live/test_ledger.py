"""The ledger of a training loop: its windows, their parts, its cost in passes, and what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import funcprobe as fp
from funcprobe.errors import FuncprobeError, InputError
from funcprobe.results.ledger_lines import read_lines
from tests.cases import ledgers, shared_work
from tests.cases.ledgers import Loop, telling, weights
from tests.cases.processes import together


def test_windows_are_told_of_their_steps(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path, {"h": fp.entropy(), "kl": fp.kl(), "reward": fp.expected_reward()})
    windows = loop.run(book, 4)
    assert [(w.number, w.first, w.last, w.generations) for w in windows] == [(k, k, k, 1) for k in range(4)]
    for window in windows:
        assert list(window.readings) == ["h", "kl", "reward"]
        assert window.readings["kl"].change > 0
        assert math.fsum(window.split.values()) == pytest.approx(window.main.first_order, rel=1e-10)
        assert window.main.change == pytest.approx(math.fsum([*window.split.values(), window.remainder]), rel=1e-12)
        assert abs(window.remainder) < 0.5 * abs(window.main.change)
        by_layer = math.fsum(part.contribution for part in window.layers.values())
        assert by_layer == pytest.approx(window.main.first_order, rel=1e-10)
        assert window.mismatch == 0
        assert window.error > 0
        assert window.completeness < 1e-10
    assert windows[0].split["momentum"] == 0
    assert windows[1].split["momentum"] != 0


def test_a_window_is_the_measurement_of_its_two_ends(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path)
    book.generation(loop.params, loop.draw())
    before = {name: p.clone() for name, p in loop.params.items()}
    for _ in range(2):
        loop.step(book, loop.draw())
    drawn = loop.draw()
    window = book.generation(loop.params, drawn)
    assert window is not None
    back = fp.Update.from_delta(loop.policy, loop.params, fp.tree.sub(before, loop.params), before)
    plain = fp.probe(back, drawn, mode="reverse")
    assert (window.main.change, window.main.first_order) == (-plain.change, -plain.first_order)
    assert (window.first, window.last) == (0, 1)


@pytest.mark.parametrize("every", [2, 3])
def test_windows_of_several_generations_leave_no_gap(tmp_path: Path, every: int) -> None:
    sums = {}
    for length in (1, every):
        loop = Loop()
        book = ledgers.ledger(loop, tmp_path / str(length), every=length, open_every=1)
        windows = loop.run(book, 6)
        sums[length] = book.books.total()
        assert [(w.first, w.last) for w in windows] == [(k, k + length - 1) for k in range(0, 6, length)]
        assert all([o.step for o in w.opened] == [w.last] for w in windows)  # the last generation's
    assert sums[1].change == pytest.approx(sums[every].change, abs=3 * math.hypot(sums[1].error, sums[every].error))


def test_several_steps_on_one_generation_have_each_its_own(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path, open_every=1, tokens=True)
    windows = loop.run(book, 2, iterations=3)
    assert [(w.first, w.last, w.generations) for w in windows] == [(0, 2, 1), (3, 5, 1)]
    for window in windows:
        assert [o.step for o in window.opened] == [*range(window.first, window.last + 1)]
        told = math.fsum(o.whole for o in window.opened)
        assert told == pytest.approx(window.split["gradient on U"], rel=1e-9)
        assert all(o.off < 1e-12 for o in window.opened)
    assert len({o.whole for w in windows for o in w.opened}) == 6
    assert len(list((tmp_path / "tokens").glob("*.parquet"))) == 6


def test_a_ledger_takes_five_passes_a_window(tmp_path: Path) -> None:
    """∇F is one pass forward and two back, θ before the steps another one, one more for float error where it shows."""
    from torch.utils.flop_counter import FlopCounterMode

    loop = Loop()
    book = ledgers.ledger(loop, tmp_path)
    book.generation(loop.params, loop.draw())
    loop.step(book, loop.draw(), told=False)
    drawn = loop.draw()
    with FlopCounterMode(display=False) as one:
        fp.score(loop.policy, loop.params, drawn)
    with FlopCounterMode(display=False) as whole:
        book.generation(loop.params, drawn)
    # the readout is run again on the way back, and is half of this model
    assert 4 < whole.get_total_flops() / one.get_total_flops() < 5


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "RMSprop"])
def test_training_is_bitwise_what_it_is_without(tmp_path: Path, optimizer: str) -> None:
    def trained(looked_at: bool) -> tuple[Any, ...]:
        loop = Loop(optimizer)
        torch.manual_seed(0)
        book = ledgers.ledger(loop, tmp_path / "with", open_every=2) if looked_at else None
        for _ in range(3):
            batch = loop.draw()
            if book is not None:
                book.generation(loop.params, batch)
                loop.step(book, batch)
            else:
                loop.backward(batch)
                loop.optimizer.step()
        state = [x for p in loop.module.parameters() for x in loop.optimizer.state[p].values()]
        return weights(loop.module), state, torch.get_rng_state(), loop.generator.get_state()

    for found, expected in zip(trained(True), trained(False), strict=True):
        pairs = zip(found.values(), expected.values(), strict=True) if isinstance(found, dict) else [(found, expected)]
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b))


def test_the_books_close_on_a_run(tmp_path: Path) -> None:
    """Σ ΔF of 12 windows against 600 rollouts at either end; N, seeds and the limit were fixed before it was run."""
    loop = Loop(prompts=40, each=2, seed=3)
    book = ledgers.ledger(loop, tmp_path, {"h": fp.entropy(), "reward": fp.expected_reward()})
    book.mark(loop.params, loop.draw(300))
    loop.run(book, 12)
    book.mark(loop.params, loop.draw(300))
    books = book.close()
    assert set(books.closing) == {"h", "reward"}
    for closing in books.closing.values():
        assert closing.missing == 0
        assert closing.total.windows == 12
        assert abs(closing.error) < 3 * closing.error_bar
        assert closing.closes == (abs(closing.error) < 2 * closing.error_bar)
    moved = books.closing["h"]
    assert abs(moved.seen) > 5 * moved.error_bar, "the run moves, or nothing is shown"


def test_a_ledger_that_draws_its_own_closes_the_last_window(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path, draw=lambda params: loop.draw())
    book.generation(loop.params)
    for _ in range(2):
        loop.step(book, loop.draw())
    books = book.close()
    assert [(w.first, w.last) for w in books] == [(0, 1)]
    assert books.lost == ()


def test_the_last_steps_of_another_are_said_to_be_in_none(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path)
    loop.run(book, 2)
    loop.step(book, loop.draw())
    books = book.close()
    assert [(lost.first, lost.last) for lost in books.lost] == [(2, 2)]
    assert [mark.step for mark in books.marks] == [0, 2]
    assert books.closing["entropy"].missing == 0
    assert "Steps 2 to 2 are in no window" in books.summary()


def test_rows_are_whole_prompts_and_drawn_by_a_generator_of_their_own(tmp_path: Path) -> None:
    loop = Loop()
    state = torch.get_rng_state()
    windows = loop.run(ledgers.ledger(loop, tmp_path, rows=8), 2)
    assert [w.evaluation.sequences for w in windows] == [8, 8]
    assert [w.evaluation.prompts for w in windows] == [4, 4]
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_measured_is_a_line_and_training_goes_on(tmp_path: Path) -> None:
    loop = Loop()
    book = fp.Ledger(loop.policy, tmp_path)
    book.generation(loop.params, loop.draw())
    loop.step(book, loop.draw())
    empty = loop.draw()
    empty = empty._replace(completion_mask=torch.zeros_like(empty.completion_mask))
    with telling() as told:
        assert book.generation(loop.params, empty) is None
    assert ["steps 0 to 0 is not in the ledger" in text for text in told] == [True]
    loop.step(book, loop.draw())
    window = book.generation(loop.params, loop.draw())
    assert window is not None
    assert (window.first, window.last) == (1, 1)
    assert [(lost.first, lost.last) for lost in book.books.lost] == [(0, 0)]


def test_a_gradient_that_is_not_finite_loses_its_window(tmp_path: Path) -> None:
    loop = Loop()
    book = fp.Ledger(loop.policy, tmp_path)
    book.generation(loop.params, loop.draw())
    update = loop.backward(loop.draw())
    next(iter(loop.module.parameters())).grad.fill_(math.nan)
    with telling() as told:
        book.before_step(update)
    assert ["Step 0 is not in the ledger" in text for text in told] == [True]
    assert book.generation(loop.params, loop.draw()) is None
    loop.step(book, loop.draw())
    assert book.generation(loop.params, loop.draw()) is not None


def test_a_run_goes_on_in_its_ledger(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path)
    loop.run(book, 4)
    book.close()
    resumed = ledgers.ledger(loop, tmp_path)
    assert len(resumed.books.windows) == 4
    resumed.generation(loop.params, loop.draw())
    loop.step(resumed, loop.draw(), number=2)  # the checkpoint was of step 2
    resumed.generation(loop.params, loop.draw())
    assert [(w.number, w.first) for w in resumed.books] == [(0, 0), (1, 1), (2, 2)]
    assert [w.first for w in read_lines(tmp_path).windows] == [0, 1, 2]
    with pytest.raises(InputError, match="Step 7 came after step 2"):
        loop.step(resumed, loop.draw(), number=7)


def test_a_second_order_is_signed_forward(tmp_path: Path) -> None:
    loop = Loop()
    for window in loop.run(ledgers.ledger(loop, tmp_path, order=2), 2):
        reading = window.main
        assert reading.second_order is not None
        # what first order at the end leaves of ΔF is of second order: −½ D²F[Δθ, Δθ], to a third
        assert reading.remainder == pytest.approx(reading.second_order, rel=1 / 3)
        assert "first_order" in reading.bars


def test_what_a_trainer_logs_stands_beside(tmp_path: Path) -> None:
    loop = Loop()
    book = ledgers.ledger(loop, tmp_path)
    book.generation(loop.params, loop.draw())
    loop.step(book, loop.draw())
    book.note({"entropy": 1.5, "grad_norm": 2, "note": "text"})
    window = book.generation(loop.params, loop.draw())
    assert window is not None
    assert window.trainer == {"entropy": 1.5, "grad_norm": 2.0}
    assert window.seconds > 0
    assert window.grad_norm is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every is 0; expected a whole number of at least 1"),
        ({"rows": True}, "rows is True"),
        ({"on_error": "ignore"}, "Unknown on_error 'ignore'"),
        ({"keep_delta": True}, "keep_delta can do nothing in a ledger"),
        ({"observables": fp.kl()}, "The first observable is a divergence"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    loop = Loop()
    with pytest.raises(FuncprobeError, match=said):
        fp.Ledger(loop.policy, tmp_path, **options)


def test_a_generation_without_rollouts_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    with pytest.raises(InputError, match="There are no rollouts"):
        ledgers.ledger(loop, tmp_path).generation(loop.params)


def test_the_ledger_of_two_processes_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = together(shared_work.ledger_of_a_loop, 2, FUNCPROBE_TEST_LEDGER=str(tmp_path / "two"))
    assert ended.codes == [0, 0], ended.words
    monkeypatch.setenv("FUNCPROBE_TEST_LEDGER", str(tmp_path / "one"))
    one = shared_work.ledger_of_a_loop()
    for found in ended.returned:
        for name, values in one.items():  # the same float64 sums in another order
            assert found[name] == pytest.approx(values, rel=1e-9, abs=1e-14), name
    assert [w.first for w in read_lines(tmp_path / "two").windows] == [0, 1]
