"""The faults found in the stateful system, each a test that its behaviour would fail; some lie in tests/compat."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import funcprobe as fp
from funcprobe import tree
from funcprobe.checkpoints.live import from_training
from funcprobe.compat import DeltaEntropyIS, ProbeComponents, buffers
from funcprobe.compat.batches import for_the_loss, to_rollouts
from funcprobe.errors import ConfigError, InputError
from tests.cases import models
from tests.cases import stateful as cases
from tests.cases.live_pairs import adamw, lora, sgd, trained
from tests.cases.snapshots import fingerprint
from tests.cases.trees import assert_same


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Return a result without what a clock says."""
    return {key: value for key, value in found.items() if key != "timing"}


def test_fault_01_optimizer_state_was_never_restored() -> None:
    """Moments were aliased, so every call moved them and the next one answered another question."""
    live = cases.pair(models.gpt2)
    for p in live[0].parameters():
        p.grad = torch.ones_like(p)
    before = fingerprint(*live)  # bits, addresses and versions of every tensor, flags, hooks, generator
    first, second = cases.probe(live), cases.probe(live)
    cases.predicted(live, param_update_buf=first["param_update_buf_named"])
    assert_same(fingerprint(*live), before)
    assert_same(numbers(first), numbers(second))


def test_fault_02_left_padding_cost_generated_tokens() -> None:
    """The completion was counted as attended tokens minus the *padded* prompt, short by the left padding."""
    packed = cases.packed(9, 1, 1)
    assert len({len(p) for p in packed.prompts}) > 1, "some rows are left-padded"
    found, plain = to_rollouts(packed.batch, eos=[cases.END]), cases.rollouts_of(packed)
    assert int(found.completion_mask.sum()) == sum(len(c) for c in packed.completions)
    assert_same(
        found._replace(group_ids=plain.group_ids)._asdict(),
        plain._asdict() | {"advantages": packed.batch["advantages"].flatten()},
    )
    live = cases.pair()
    assert cases.probe(live)["H_orig"] == pytest.approx(cases.probe(live, E=plain)["H_orig"], rel=1e-12)


def test_fault_03_entropy_in_bfloat16_and_a_flat_change() -> None:
    """bfloat16 softmax cost .03 nats a token; and at small rates ΔH was rounding."""
    module = cases.table(torch.bfloat16)
    ids = torch.cat([torch.tensor(p + c)[len(p) - 1 : -1] for p, c in zip(*cases.packed(9, 1, 1)[1:], strict=True)])
    logits = module.logits.weight.detach()[ids]
    exact, narrow = (nn.functional.log_softmax(logits.to(d), -1) for d in (torch.float64, torch.bfloat16))
    expected, off = (float(-(x.exp() * x).sum(-1).double().mean()) for x in (exact, narrow))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    found = cases.probe((module, optimizer), {"report_per_token": True})
    assert abs(off - expected) > 1e-4, "this would be seen"
    # entries of the softmax are float32: some 10 ulp of 2 nats
    assert abs(found["H_orig_tok"] - expected) < 3e-6

    live = cases.pair(lambda: models.gpt2().float(), sgd)
    for lr in (1e-4, 1e-8):
        truth = cases.probe(live, {"lr_override": lr})
        along = cases.predicted(live, param_update_buf=truth["param_update_buf_named"])
        # |δF₂/δF₁| is about 50 η here; below it is float32 in the path: 1e-4 is generous
        assert truth["deltaH_true"] / along["deltaH1"] == pytest.approx(1, abs=1e-4 + 200 * lr), lr


def test_fault_05_naive_gradient_off_by_one_token() -> None:
    """Against loops and autograd: token t is predicted by column t − 1."""
    module = cases.table()
    packed = cases.packed(9, 1, 1)
    weight = module.logits.weight.detach().clone().requires_grad_()
    sums = []
    for prompt, completion in zip(packed.prompts, packed.completions, strict=True):
        tokens = [*prompt, *completion]
        terms = [torch.log_softmax(weight[tokens[t - 1]], -1)[tokens[t]] for t in range(len(prompt), len(tokens))]
        sums.append(torch.stack(terms).sum())
    s = torch.stack(sums)
    # H = −Σ softmax(s − s₀) s, so ∇H = −(1/N) Σ (s − s̄ + 1) ∇s
    (gradient,) = torch.autograd.grad(-((s - s.mean() + 1).detach() * s).mean(), weight)
    buffer = {"logits.weight": torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).double()}
    live = module, torch.optim.SGD(module.parameters(), lr=1.0)
    found = cases.predicted(live, {"estimator": {"x_estimator_mode": "naive"}}, param_update_buf=buffer)
    assert found["deltaH1"] == pytest.approx(float((gradient * buffer["logits.weight"]).sum()), rel=1e-10)


@pytest.mark.parametrize("mode", ["rb_residual", "naive"])
def test_fault_06_prediction_and_measurement_in_different_normalisations(mode: str) -> None:
    """Ragged completions: mean per sequence, per longest completion and per token are then three numbers."""
    live, config = cases.pair(optimizer=sgd), {"estimator": {"x_estimator_mode": mode}}
    gaps: dict[str, list[float]] = {"": [], "_tok": []}
    for lr in (1e-3, 1e-4):
        truth = cases.probe(live, {"lr_override": lr, "report_per_token": True}, config)
        along = cases.predicted(live, config, param_update_buf=truth["param_update_buf_named"])
        for ending, found in gaps.items():
            found.append(abs(along["deltaH1" + ending] / truth["deltaH_true" + ending] - 1))
    for found in gaps.values():
        assert found[1] < 1e-3
        assert math.log10(found[0] / found[1]) == pytest.approx(1, abs=0.2)  # what is left is second order


def test_fault_07_log_weights_subtracted_in_float32() -> None:
    live = cases.pair(optimizer=sgd)
    found = cases.probe(live, {"lr_override": 1e-9})["diagnostics"]
    at = from_training(*live)
    E = to_rollouts(cases.evaluation(), eos=[cases.END])
    step = cases.probe(live, {"lr_override": 1e-9})["param_update_buf_named"]
    after = tree.add(at.params, tree.like(step, at.params))
    old, new = (fp.score(at.policy, p, E).logp.sum(1) for p in (at.params, after))
    expected = float((new - old).mean())
    # sums of 1e1 in float64 are good to 1e-15, the step to 6e-8 of itself
    assert found["logw_mean"] == pytest.approx(expected, rel=1e-5, abs=1e-14)
    assert 0 < abs(expected) < 1e-7
    assert abs(float((new.float() - old.float()).mean()) - expected) > 0.1 * abs(expected), "this would be seen"


def test_fault_08_step_in_train_mode_with_dropout_and_mode_not_restored() -> None:
    live = cases.pair(lora)
    live[0].eval()
    expected = cases.probe(live)
    live[0].train()
    list(live[0].modules())[5].eval()  # a mode that no single flag restores
    modes, rng = [m.training for m in live[0].modules()], torch.random.get_rng_state()
    found = cases.probe(live)
    assert_same(numbers(found), numbers(expected))
    assert [m.training for m in live[0].modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), rng)


#: A key, a value, and what it changes; nothing for a value that is refused.
KEYS: dict[str, tuple[Any, str | None]] = {
    "importance_microbatch_size": (2, "rows at a time"),
    "report_per_token": (True, "H_orig_tok"),
    "snapshot_device": ("cuda", None),
    "return_param_update_buf": (False, "param_update_buf_named"),
    "measure": ("p", "H_orig"),
    "lr_override": (1e-2, "param_update_l2"),
    "rl_grad_accum": (3, "rows at a time"),
    "training_loss": ("nll", None),
    "is_mode": ("clip", "H_upd"),
    "clip_c": (3.0, None),
    "no_such_key": (1, None),
}


@pytest.mark.parametrize("key", KEYS)
def test_fault_09_config_keys_that_did_nothing(key: str) -> None:
    value, changed = KEYS[key]
    live, config = cases.pair(), {"generation": {"temperature": 0.7}}
    base = {"lr_override": 0.1} if key == "is_mode" else {}  # weights that there is something to clip of
    cfg = {**base, key: value} | ({"clip_c": 1.01} if key == "is_mode" else {})
    if changed is None:
        with pytest.raises(ConfigError, match=key):
            cases.probe(live, cfg, config)
        return
    rows: list[int] = []
    # before anything is scored the copy of a module is tried on rows of four tokens
    live[0].register_forward_hook(lambda module, args, out: rows.append(len(args[0]) * (args[0].shape[1] != 4)))
    plain, plain_rows = cases.probe(live, base, config), sorted(rows)
    rows.clear()
    found = cases.probe(live, cfg, config)
    if changed == "rows at a time":
        # by prompts, of one completion in E (at θ and at θ′: 9 prompts) and three in U (4 prompts)
        assert {n: plain_rows.count(n) for n in (2, 3, 6)} == {2: 0, 3: 4, 6: 0}
        expected = {2: 8, 3: 0, 6: 2} if key == "importance_microbatch_size" else {2: 0, 3: 0, 6: 0}
        assert {n: rows.count(n) for n in (2, 3, 6)} == expected
        assert found["deltaH_true"] == pytest.approx(plain["deltaH_true"], rel=1e-9)
    elif changed == "H_orig_tok":
        assert changed in found
        assert changed not in plain
    elif changed == "param_update_buf_named":
        assert found[changed] is None
        assert plain[changed] is not None
    else:
        assert abs(found[changed] / plain[changed] - 1) > 1e-5


def test_fault_09_keys_of_training_that_did_nothing() -> None:
    live = cases.pair()
    assert cases.probe(live, config={"max_grad_norm": 1e-3})["param_update_l2"] != cases.probe(live)["param_update_l2"]
    for config, said in {
        "kl_beta": ({"kl_beta": 0.1}, "ref_logps"),
        "clip_eps": ({"clip_eps": "0.2"}, "clip_eps is '0.2', a str"),
        "estimator": ({"estimator": {"x_estimator_mode": "rao"}}, "x_estimator_mode is 'rao'"),
    }.values():
        with pytest.raises(InputError, match=said):
            cases.probe(live, config=config)
    with pytest.raises(InputError, match="weighting_mode is 'per_token_avg'"):
        cases.predicted(live, weighting_mode="per_token_avg", param_update_buf={})


def test_fault_10_buffer_over_frozen_weights_and_names_skipped_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    live = cases.pair(lora)
    buffer = cases.probe(live)["param_update_buf_named"]
    assert list(buffer) == [name for name, p in live[0].named_parameters() if p.requires_grad]
    expected = cases.predicted(live, param_update_buf=buffer)["deltaH1"]
    assert expected != 0
    for prefix in ("module.", "module.base_model.model."):
        renamed = {
            prefix + name.removeprefix("base_model.model." * (prefix != "module.")): x for name, x in buffer.items()
        }
        assert cases.predicted(live, param_update_buf=renamed)["deltaH1"] == expected
    frozen = next(name for name, p in live[0].named_parameters() if not p.requires_grad)
    fewer = dict(list(buffer.items())[1:]) | {frozen: torch.zeros(1)}
    with pytest.raises(InputError, match=r"1 unknown.*1 missing"):
        cases.predicted(live, param_update_buf=fewer)
    with caplog.at_level("WARNING"):
        loose = cases.predicted(live, param_update_buf=fewer, strict=False)["deltaH1"]
    assert "1 unknown" in caplog.text
    assert "1 missing" in caplog.text
    missing = {name: x * (name not in fewer) for name, x in buffer.items()}
    rest = cases.predicted(live, param_update_buf=missing)["deltaH1"]
    assert loose + rest == pytest.approx(expected, rel=1e-6)
    for strict in (True, False):
        with pytest.raises(InputError, match="None of the 1 entries"):
            cases.predicted(live, param_update_buf={"transformer.nothing": torch.zeros(1)}, strict=strict)
        with pytest.raises(InputError, match="None of the 0 entries"):
            cases.predicted(live, param_update_buf={}, strict=strict)


def test_fault_12_averages_treated_as_sums_across_microbatches() -> None:
    live = cases.pair()
    one_rate(live)
    whole = cases.probe(live, {"importance_microbatch_size": 9})
    legacy = cases.predicted(live, mb_size_prompts=9, optimizer=live[1])
    for size in (1, 2, 4):  # 9 prompts of E and 4 of U: pieces of unequal size
        cut = cases.probe(live, {"importance_microbatch_size": size, "rl_grad_accum": size})
        for key in ("H_orig", "H_upd", "deltaH_true", "param_update_l2"):
            assert cut[key] == pytest.approx(whole[key], rel=1e-9), (size, key)
        along = cases.predicted(live, mb_size_prompts=size, optimizer=live[1])
        assert along["deltaH1"] == pytest.approx(legacy["deltaH1"], rel=1e-9)


def one_rate(live: cases.Pair) -> torch.optim.Optimizer:
    """Give every group the learning rate of the first: the legacy path has one."""
    for group in live[1].param_groups:
        group["lr"] = 1e-3
    return live[1]


def test_fault_14_end_token_left_out_when_pad_equals_eos() -> None:
    packed = cases.packed(9, 1, 1)
    careless = (packed.batch["sequences"] != cases.END).long()  # what a tokenizer without a pad token leads to
    assert int(careless.sum()) == int(packed.batch["attention_masks"].sum()) - 9
    plain = cases.rollouts_of(packed)
    lengths = [[len(c)] for c in packed.completions]
    for changes in (
        {"attention_masks": careless},
        {"attention_masks": careless, "gen_lens": lengths},
        {"gen_lens": lengths},
    ):
        found = to_rollouts({**packed.batch, **changes}, eos=[cases.END])
        assert torch.equal(found.ids, plain.ids)
        assert torch.equal(found.completion_mask, plain.completion_mask)
    live = cases.pair(models.gpt2)  # whose configuration names the end token
    expected, found = (cases.probe(live, E=E) for E in (packed.batch, {**packed.batch, "attention_masks": careless}))
    assert found["H_orig"] == expected["H_orig"]


def test_fault_16_caches_keyed_by_the_address_of_a_batch() -> None:
    live, batch, other = cases.pair(), cases.evaluation(), cases.packed(9, 1, 5).batch
    instance = DeltaEntropyIS(model=live[0], config={}, logger=None)
    components = ProbeComponents(live[0], {}, None)
    cases_of = []
    for contents in (dict(batch), other):
        batch.clear()
        batch.update(contents)  # the same dictionary at the same address
        truth = instance.entropy_change_two_batch(live[0], batch, cases.update(), live[1], {})
        along = components.compute_delta_h1_from_batches(
            E_batch=batch, param_update_buf=truth["param_update_buf_named"]
        )
        cases_of.append((truth["H_orig"], along["deltaH1"]))
    fresh = cases.probe(live, E=other)
    assert cases_of[1][0] == fresh["H_orig"] != cases_of[0][0]
    assert cases_of[1][1] != cases_of[0][1]


def test_fault_17_standard_errors_too_small_by_the_number_of_microbatches() -> None:
    """compat returns no standard error of its own; the core's, on the same batch, is that of leaving prompts out."""
    live = cases.pair()
    found = cases.probe(live)
    assert not [key for key in {**found, **found["diagnostics"]} if "se" in key.lower().split("_")]
    U = for_the_loss(cases.update(), to_rollouts(cases.update()))
    update = from_training(*live).update(fp.dr_grpo(normaliser=1.0), U)
    E = cases.evaluation()
    errors = []
    for microbatch in (1, 4, None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entropy = fp.entropy("rao_blackwell", "sequence", "sequence")
            result = fp.probe(update, to_rollouts(E), entropy, bars="jackknife", microbatch=microbatch)
        errors.append(result.main.bars["change"].error)
    kept = [torch.arange(9) != b for b in range(9)]
    names = ("sequences", "attention_masks")
    left_out = [
        cases.probe(live, E={**{n: E[n][k] for n in names}, "prompt_lens": E["prompt_lens"][:8]})["deltaH_true"]
        for k in kept
    ]
    values = torch.tensor(left_out, dtype=torch.float64)
    by_hand = math.sqrt(8 / 9 * float(((values - values.mean()) ** 2).sum()))
    assert errors == pytest.approx([by_hand] * 3, rel=1e-8)


def test_fault_18_missing_denominator_term_of_the_per_token_ratio() -> None:
    live = cases.pair(optimizer=sgd)
    truth = cases.probe(live, {"lr_override": 1e-5, "report_per_token": True})
    along = cases.predicted(live, param_update_buf=truth["param_update_buf_named"])
    lengths = [len(c) for c in cases.packed(9, 1, 1).completions]
    without = along["deltaH1"] / (sum(lengths) / len(lengths))  # the numerator's part alone
    assert truth["deltaH_true_tok"] == pytest.approx(along["deltaH1_tok"], rel=1e-3)
    assert abs(without / truth["deltaH_true_tok"] - 1) > 0.02, "this would be seen"


def test_fault_19_momentum_and_weight_decay_left_out_of_the_predicted_step() -> None:
    for optimizer in (sgd, adamw):
        live = cases.pair(optimizer=optimizer)
        one_rate(live)
        truth = cases.probe(live, {"lr_override": 1e-6})
        along = cases.predicted(live, param_update_buf=truth["param_update_buf_named"])
        assert along["deltaH1"] == pytest.approx(truth["deltaH_true"], rel=1e-2)
        legacy = cases.predicted(live, optimizer=live[1])
        assert abs(legacy["deltaH1"] * 1e-3 / truth["deltaH_true"] - 1) > 0.1, "the legacy path is no such step"
        still = {**cases.update(), "advantages": torch.zeros(4, 3)}
        for group in live[1].param_groups:
            group["weight_decay"] = 0.1
        kept = cases.probe(live, U=still)["param_update_buf_named"]
        expected = cases.stateful(live, U=still).param_update  # a real step along a gradient of 0
        assert all(torch.allclose(kept[n].double(), expected[n], rtol=2e-7, atol=1e-12) for n in expected)
        assert float(tree.norm(kept)) > 1e-5


def test_fault_20_hyperparameters_read_from_defaults() -> None:
    module = cases.table()
    live = module, torch.optim.AdamW(module.parameters(), lr=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.9)
    changed = {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}
    live[1].param_groups[0].update(changed)
    trained(*live)
    found, expected = cases.probe(live), cases.stateful(live)
    assert found["learning_rate_used"] == 2e-3
    (buffer,), (real,) = found["param_update_buf_named"].values(), expected.param_update.values()
    assert torch.allclose(buffer.double(), real, rtol=2e-7, atol=1e-12)

    at = from_training(*live)
    U = for_the_loss(cases.update(), to_rollouts(cases.update()))
    gradient = at.update(fp.dr_grpo(normaliser=1.0), U).gradient().gradient
    v, t = (at.opt_state["logits.weight"][key] for key in ("exp_avg_sq", "step"))
    y = -gradient["logits.weight"] / (torch.sqrt(v / (1 - 0.95 ** float(t))) + 1e-6)
    legacy = cases.predicted(live, optimizer=live[1])
    along = cases.predicted(live, param_update_buf={"logits.weight": 2e-3 * y})
    assert legacy["learning_rate"] == 2e-3
    assert legacy["deltaH1"] == pytest.approx(along["deltaH1"], rel=1e-9)
    assert buffers.leaves(module).keys() == {"logits.weight"}
    live[1].param_groups.append({**live[1].param_groups[0], "params": []})  # a group without leaves preconditions none
    assert cases.predicted(live, optimizer=live[1])["deltaH1"] == legacy["deltaH1"]
