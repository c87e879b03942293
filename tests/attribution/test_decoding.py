"""Token ids as text: spaces kept under every kind of tokenizer, ids where there is no text."""

from __future__ import annotations

import pytest
import torch

import funcprobe as fp
from funcprobe.attribution.decoding import shown, vocabulary_of
from tests.cases.attributions import Stepped
from tests.cases.probes import E, U
from tests.cases.tokenizers import BUILD, TEXT, WORDS, tokenizer


def batch(ids: list[int]) -> fp.Rollouts:
    return fp.rollouts_from_lists([ids[:1]], [ids[1:]], temperature=1.0)


@pytest.mark.parametrize("wrapped", [True, False], ids=["transformers", "tokenizers"])
@pytest.mark.parametrize("kind", BUILD)
def test_texts_of_tokens_put_together_are_the_text(kind: str, wrapped: bool) -> None:
    t = tokenizer(kind, wrapped)
    ids = tokenizer(kind, False).encode(TEXT).ids
    vocabulary = vocabulary_of(t, [batch(ids)])
    assert vocabulary is not None
    assert vocabulary.keys() == set(ids)
    joined = "".join(vocabulary[i] for i in ids)
    # metaspace marks the space before the first word too, and the words of the third are put together by spaces
    assert joined == (TEXT if kind == "byte level" else f" {TEXT}")


def test_a_tokenizer_that_tidies_spaces_away_does_not_here() -> None:
    ids = tokenizer("words", False).encode(TEXT).ids
    tidying = tokenizer("words", True, tidy=True)
    assert tidying.decode(ids, clean_up_tokenization_spaces=True) != TEXT  # "did n't ." becomes "didn't."
    assert vocabulary_of(tidying, [batch(ids)]) == vocabulary_of(tokenizer("words", True), [batch(ids)])


def test_special_tokens_and_broken_characters_are_shown() -> None:
    t = tokenizer("byte level", True)
    special, broken = t.convert_tokens_to_ids("<eos>"), t.convert_tokens_to_ids("â")
    t.add_special_tokens({"eos_token": "<eos>"})
    vocabulary = vocabulary_of(t, [batch([special, broken])])
    assert vocabulary == {special: "<eos>", broken: "\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("wrapped", [True, False], ids=["transformers", "tokenizers"])
@pytest.mark.parametrize("kind", BUILD)
def test_an_id_that_the_tokenizer_does_not_know_is_an_id(kind: str, wrapped: bool) -> None:
    """Models pad their vocabularies: an id may be drawn that no tokenizer has a text for."""
    vocabulary = vocabulary_of(tokenizer(kind, wrapped), [batch([1, 5000, 2])])
    assert vocabulary is not None
    assert shown(5000, vocabulary) == "[5000]"
    assert shown(1, vocabulary) not in ("", "[1]")


def test_without_a_tokenizer_there_are_ids() -> None:
    assert vocabulary_of(None, [batch([1, 2])]) is None
    assert (shown(7, None), shown(7, {}), shown(7, {7: ""}), shown(7, {7: " the"})) == ("[7]", "[7]", "[7]", " the")


def test_padding_is_no_text_and_every_batch_is_read() -> None:
    ragged = fp.rollouts_from_lists([[1], [2]], [[3, 4], [5]], temperature=1.0)
    ragged = ragged._replace(ids=torch.where(ragged.attention_mask, ragged.ids, 9))
    found = vocabulary_of(tokenizer("words", True), [ragged, batch([6, 7])])
    assert found is not None
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]


def test_tables_have_texts_with_a_tokenizer_and_ids_without() -> None:
    case = Stepped("two lines")
    spoken, mute = case.attribute(tokenizer=tokenizer("words", True)), case.attribute()
    for of, rollouts in (("batch", U), ("evaluation", E)):
        tokens = spoken.to_frame("tokens", of)
        names = dict(enumerate([" <unk>", *(f" {w}" for w in WORDS)]))
        assert tokens["text"].tolist() == [names[i] for i in tokens["token"]]
        assert mute.to_frame("tokens", of)["text"].tolist() == [f"[{i}]" for i in tokens["token"]]
        prompt = rollouts.ids[0, : int(rollouts.prompt_lengths[0])].tolist()
        first = int(rollouts.group_ids[0])
        prompts = spoken.to_frame("prompts", of).set_index("prompt")
        assert prompts["text"][first] == "".join(names[i] for i in prompt)
        assert mute.to_frame("prompts", of).set_index("prompt")["text"][first] == " ".join(f"[{i}]" for i in prompt)
        assert spoken.to_frame("sequences", of)["text"][0] == "".join(tokens[tokens["sequence"] == 0]["text"])
    numbers = [f for f in mute.to_frame().columns if f != "text"]
    assert spoken.to_frame()[numbers].equals(mute.to_frame()[numbers])
