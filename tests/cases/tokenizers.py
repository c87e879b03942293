"""Tokenizers of every kind, trained on one sentence."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the cat sat on the mat , the dog did n't ."
WORDS = ["the", "cat", "sat", "on", "mat", ",", "dog", "did", "n't", "."]


def byte_level() -> Tokenizer:
    """Return a byte-level BPE as GPT-2 and Qwen2 have: a token carries its leading space."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT] * 5, trainer)
    return made


def metaspace() -> Tokenizer:
    """Return a BPE with ▁ for spaces, as Llama 2 and Gemma have: a text that opens with a token loses its space."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([TEXT] * 5, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    return made


def words() -> Tokenizer:
    """Return a word-level tokenizer, which puts a space between words."""
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


BUILD = {"byte level": byte_level, "metaspace": metaspace, "words": words}


@functools.cache
def tokenizer(kind: str, wrapped: bool, tidy: bool = False) -> Any:
    made = BUILD[kind]()
    if not wrapped:
        return made
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=tidy)
