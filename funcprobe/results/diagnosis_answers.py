"""The answers of a diagnosis: a question, its verdict by rule, the numbers with their bars, and one thing to try."""

from __future__ import annotations

from collections.abc import Mapping

from funcprobe.attribution.token_tables import Columns, movers
from funcprobe.errors import percent
from funcprobe.estimators.uncertainty import Bar
from funcprobe.measurement.drawn import Drawn
from funcprobe.results import diagnosis_rules as rules
from funcprobe.results.attribution_words import share
from funcprobe.results.diagnosis_remedies import what_would_change_it
from funcprobe.results.diagnosis_rules import CANNOT_TELL, LIMITS, NOT_KNOWN
from funcprobe.results.findings import Answer, Findings
from funcprobe.results.parts import Parts
from funcprobe.results.probe_words import named
from funcprobe.results.sweep_words import lr_text
from funcprobe.results.words import storage_of, with_error
from funcprobe.visible_text import shortened, visible

#: Characters of a prompt or a token in a sentence.
_WIDTH = 20


def answers_of(found: Findings) -> tuple[Answer, ...]:
    """Return the answers, in the order in which one would ask."""
    given = (does_it_move, who_did_it, where_it_was, is_it_too_large, is_it_held_back, is_it_stale, is_it_stored)
    return (*(answer(found) for answer in given), what_would_change_it(found))


def does_it_move(found: Findings) -> Answer:
    """Say whether the main observable falls or rises, and whether that can be told from none."""
    main, what = found.main, named(found.probe.outcome, found.probe.family)
    bar, prompts = main.bars.get("change"), found.provenance.evaluation.prompts
    verdict = rules.direction(main.change, bar, lost=main.is_lost)
    of_it = f" ({percent(abs(main.change / main.before), 2)} of it)" if main.before else ""
    sentence = f"ΔF {_number(main.change, bar)} {main.unit}{of_it}, over {prompts} prompts of E."
    return Answer(f"Does {what} fall, and can one tell?", verdict, sentence, _advice_on_move(found, verdict), bar)


def _advice_on_move(found: Findings, verdict: str) -> str:
    main, prompts = found.main, found.provenance.evaluation.prompts
    if verdict == NOT_KNOWN:
        return "measure with bars, on an E of at least two prompts."
    if verdict == "does not move":
        return "look for a learning rate, or advantages, of 0: the step moves nothing."
    if main.is_lost:
        return "measure with method: path; the float error of the difference is above a tenth of it."
    if verdict == CANNOT_TELL:
        more = rules.more_prompts(main.bars["change"], prompts)
        if more is None:
            return "measure again with another E; no number of prompts can be named where the estimate is 0."
        return f"cannot tell from these rollouts: {more:,} more prompts would ({prompts + more:,} in all)."
    return "keep a ledger of the run (funcprobe ledger): what one step does, a run repeats."


def who_did_it(found: Findings) -> Answer:
    """Say whether the batch at hand did it, or momentum and weight decay from earlier steps."""
    question, parts = "The batch at hand, or momentum and decay?", found.attribution
    if parts is None:
        return _unknown(question, found, "attribution")
    bars = parts.bars.get("ledger", {})
    verdict = rules.culprit(parts.ledger, bars)
    whole = parts.first_order
    rows = sorted(((row, x) for row, x in parts.ledger.items() if x), key=lambda pair: -abs(pair[1]))
    told = ", ".join(f"{row} {_number(x, bars.get(row))} ({share(x, whole)} of δF₁)" for row, x in rows)
    names = {"gradient on U": "the batch at hand"}
    advice = _ON_CULPRIT.get(verdict, "change one of them alone, and measure again.")
    return Answer(
        question, names.get(verdict, verdict), _begun(f"{told or 'every part is 0'}."), advice, bars.get(verdict)
    )


_ON_CULPRIT = {
    "gradient on U": "look at its prompts and tokens, below.",
    "momentum": "attribute the steps before this one: this batch was not the main cause.",
    "weight decay": "set weight_decay lower, or leave norms and biases out of it.",
    "rest": "use form additive with SGD, Adam or AdamW: this optimizer hides momentum in the rest.",
    "nothing moved": "look for a learning rate, or advantages, of 0.",
    CANNOT_TELL: "sample E from more prompts: the leading part is within its bar of 0.",
}


def where_it_was(found: Findings) -> Answer:
    """Say which prompts, tokens and layers moved it most, and whether few of them did it."""
    question, parts = "Which prompts, which tokens, which layers?", found.attribution
    if parts is None:
        return _unknown(question, found, "attribution")
    held = {
        "prompts_tenth": rules.held_by_largest(parts.columns("prompts")["contribution"], 0.1),
        "tokens_hundredth": rules.held_by_largest(parts.columns("tokens")["contribution"], 0.01),
        "one_layer": rules.held_by_largest(parts.columns("layers")["contribution"], 0.0),
    }
    verdict = rules.concentration(*held.values())
    largest = "; ".join(filter(None, (_largest(parts, table) for table in ("prompts", "tokens", "layers"))))
    among = f"of Σ|parts|, a tenth of the prompts holds {percent(held['prompts_tenth'], 0)}"
    among += f", a hundredth of the tokens {percent(held['tokens_hundredth'], 0)}"
    return Answer(question, verdict, _begun(f"{largest or 'no part moved it'}; {among}."), _advice_on_place(held))


def _advice_on_place(held: Mapping[str, float]) -> str:
    worst = max(held, key=lambda name: held[name] - LIMITS[name])
    if held[worst] <= LIMITS[worst]:
        return "change the loss or the step rather than the data: no few rows did it."
    if worst == "one_layer":
        return "a learning rate of its own for that layer, or freeze it."
    units = "prompts" if worst == "prompts_tenth" else "tokens"
    return f"drop them and step again: funcprobe validate --units {units}."


def _largest(parts: Parts, table: str) -> str:
    """Return the row of a table that moved it furthest, either way."""
    columns = parts.columns(table)
    row = max((rows for rows in movers(columns, 1) if len(rows["contribution"])), key=_size, default=None)
    if row is None:
        return ""
    x = float(row["contribution"][0])
    error = f" ± {row['error'][0]:.1e}" if "error" in row else ""
    return f"{_label(table, row)} {x:+.2e}{error} ({share(x, parts.first_order)})"


def _size(rows: Columns) -> float:
    return abs(float(rows["contribution"][0]))


def _label(table: str, row: Columns) -> str:
    if table == "layers":
        return str(row["layer"][0])
    text = visible(shortened(str(row["text"][0]), _WIDTH))
    if table == "prompts":
        return f"prompt {row['prompt'][0]} “{text}”"
    return f"token “{text}” at {row['position'][0]} of sequence {row['sequence'][0]}"


def is_it_too_large(found: Findings) -> Answer:
    """Say whether the step is too large for first order, or for the rollouts that measure it."""
    main, probe = found.main, found.probe
    remainder = main.bars.get("remainder")
    verdict = rules.step_size(main.nonlinearity, remainder, found.ess)
    at = "" if probe.lr is None else f" at lr {lr_text(probe.lr)}"
    missed = "what first order misses is lost in float error"
    if not main.is_lost:
        missed = f"first order misses {percent(main.nonlinearity)} of ΔF{at} ({_number(main.remainder, remainder)})"
    kl = probe.readings.get("kl")
    said = [missed, f"effective sample {percent(found.ess)}"]
    said += [] if kl is None else [f"KL {_number(kl.change, kl.bars.get('change'))} {kl.unit}"]
    crossover = None if found.curve is None else found.curve.crossover
    said += [] if crossover is None else [f"|δF₂| = |δF₁| at lr {lr_text(crossover, 2)}"]
    sentence = f"{'; '.join(said)}.{_largest_step(found)}"
    return Answer("Is the step too large?", verdict, _begun(sentence), _advice_on_size(found, verdict), remainder)


def _largest_step(found: Findings) -> str:
    if found.largest is None:
        return f" Other learning rates: {NOT_KNOWN}, {found.missing.get('curve', 'no lr keeps the bounds')}."
    lr = lr_text(found.largest.lr, 2)
    return f" Largest lr not too large: {lr}{'' if found.largest.limited_by else ' or more'}."


def _advice_on_size(found: Findings, verdict: str) -> str:
    lr, largest = found.probe.lr, found.largest
    if verdict == "small":
        return "keep the learning rate: it is not the cause."
    if verdict == CANNOT_TELL:
        return "more prompts in E, or method: path; what first order misses is within its bar of 0."
    if largest is not None and lr is not None and largest.lr < lr:
        return f"lr {lr_text(largest.lr, 2)}, the largest at which the step is not too large."
    if verdict == "too large":
        return "half the learning rate, and measure again."
    return "half the learning rate, where you want the gradient to mean what it says."


def is_it_held_back(found: Findings) -> Answer:
    """Say whether the clip range, the norm clip or masks change the step."""
    question, info = "Do clipping or masks do anything?", found.probe.info
    drawn = found.drawn.get("U")
    if drawn is None or "clip_fraction" not in info:
        why = "the loss does not say what it clips" if drawn is not None else _without_tokens(found)
        return Answer(question, NOT_KNOWN, _begun(f"{why}."), _MAKE_BATCH)
    clipped, coefficient = info["clip_fraction"], info.get("clip_coefficient", 1.0)
    chosen = {name.removesuffix("_fraction"): x for name, x in info.items() if name.endswith("_fraction")}
    masked = max([drawn.holes / max(1, drawn.tokens + drawn.holes), *chosen.values()])
    verdict = rules.held_back(clipped, coefficient, masked)
    norm = f", the norm clip multiplies the gradient (norm {info['grad_norm']:.3g}) by {coefficient:.3g}"
    said = f"The clip range holds {percent(clipped, 2)} of U's tokens{norm if 'grad_norm' in info else ''}"
    said += f", masks leave out {drawn.holes:,} of {drawn.tokens + drawn.holes:,} tokens"
    said += "".join(f", {name} singles out {percent(x, 2)}" for name, x in chosen.items() if name != "clip")
    at_one = found.ratios is None or found.ratios.largest - 1 < 1e-4
    advice = "leave epsilon alone: every ratio is 1, where no clip range can act." if at_one else _LESS_CLIP
    if coefficient <= 1 - LIMITS["acts"]:
        advice = (
            "a larger max_grad_norm beside this one, in compare: under Adam it turns the step more than it shortens."
        )
    return Answer(question, verdict, f"{said}; counts, without bars.", advice)


_LESS_CLIP = "clip-higher (epsilon_high), compared below, where the clip range holds tokens that would rise."
_WITH_TANGENTS = "mode auto, and attention in its eager or sdpa form: parts are made of forward-mode passes."
_MAKE_BATCH = "make the update from its batch: run.update(objective, U)."


def is_it_stale(found: Findings) -> Answer:
    """Say whether U is stale, or a batch was drawn by another policy than θ."""
    question, drawn, ratios = "Is the batch stale, or from another policy?", found.drawn, found.ratios
    truncated = [name for name, batch in drawn.items() if batch.truncated]
    several = len({batch.temperatures for batch in drawn.values()}) > 1
    log_ratio, ess = (None, None) if ratios is None else (ratios.mean, ratios.ess)
    verdict = rules.origin([b.gap for b in drawn.values()], bool(truncated) or several, log_ratio, ess)
    said = [_sampler(name, batch) for name, batch in drawn.items()]
    if ratios is not None:
        said.append(
            f"|log π/π_old| of U {ratios.mean:.2g} nats per token, effective sample by its ratios {percent(ratios.ess)}"
        )
    elif "U" in drawn:
        said.append("U has no old_logps, and its ratios count as 1")
    else:
        said.append("U is not known")
    said += [f"{name} was drawn under top_p or top_k" for name in truncated]
    advice = _ON_ORIGIN[verdict]
    if truncated:
        advice = "sample with top_p 1 and top_k 0: ratios and entropies are those of the whole distribution."
    elif several:
        advice = "sample E and U at one temperature."
    return Answer(question, verdict, _begun(f"{'; '.join(said)}."), advice)


_ON_ORIGIN = {
    "fresh": "no change: both batches are θ's own, as far as their columns tell.",
    "stale": "fewer steps on one generation (num_iterations, steps_per_generation).",
    "another policy": "score rollouts with the trainer's own weights and precision, and temperature as sampled.",
    NOT_KNOWN: "store sampling_logps, or old_logps, with the rollouts.",
}


def _sampler(name: str, batch: Drawn) -> str:
    low, high = batch.temperatures
    at = f"temperature {low:g}" if low == high else f"temperatures {low:g} to {high:g}"
    steps = "" if batch.steps is None or len(set(batch.steps)) == 1 else ", of steps {} to {}".format(*batch.steps)
    return f"{name}: sampler {_off(batch.gap)}, {at}{steps}"


def _off(gap: float | None) -> str:
    return "not recorded" if gap is None else f"off by {gap:.2g} nats per token"


def is_it_stored(found: Findings) -> Answer:
    """Say whether the step survives the dtype that θ′ is stored in."""
    outcome, main = found.probe.outcome, found.main
    verdict, dtype = rules.storage(outcome.rounding_ratio), storage_of(found.provenance)
    said = f"Stored in {dtype}, rounding is {percent(outcome.rounding_ratio, 2)} of ‖Δθ‖"
    said += f"; {percent(outcome.unmoved, 2)} of the entries that should move do not"
    exact = main.change if main.of_delta else main.exact
    stored = main.stored if main.of_delta else main.change
    bar = None
    if verdict != "kept" and exact is not None and stored is not None:
        own = ("change", "stored") if main.of_delta else ("exact", "change")
        bar = main.bars.get(own[1])
        said += f"; ΔF exact {_number(exact, main.bars.get(own[0]))}, as stored {_number(stored, bar)}"
    advice = "no change: storage is not where it goes." if verdict == "kept" else _WIDER
    return Answer("Is the step lost in storage?", verdict, f"{said}.", advice, bar)


_WIDER = "float32 master weights, or stochastic rounding; docs/recipes/bf16.md."


def _unknown(question: str, found: Findings, component: str) -> Answer:
    why = found.missing.get(component, f"no {component} was made")
    return Answer(question, NOT_KNOWN, _begun(f"{why}."), _WITH_TANGENTS if "U" in found.drawn else _MAKE_BATCH)


def _without_tokens(found: Findings) -> str:
    return found.missing.get("attribution", "the update knows no batch")


def _number(value: float, bar: Bar | None) -> str:
    return with_error(value, bar, digits=2)


def _begun(text: str) -> str:
    """Return a sentence with a capital letter."""
    return text[:1].upper() + text[1:]
