"""What is no plain decoder of text: models of images and text used on text alone, encoders, encoders with decoders."""

from __future__ import annotations

from tests.families.building import ASKED, Family

#: Positions in three parts: time, height and width.
THREE_PARTS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
IMAGES = "ImageTextToText"

ENCODER_DECODER = dict.fromkeys(ASKED, "is an encoder-decoder; a policy is a causal language model")
NOT_CAUSAL = dict.fromkeys(ASKED, "sees what comes after it")

MULTIMODAL = (
    Family("qwen2_vl", "qwen2_vl", "positions in three parts", {"rope_parameters": THREE_PARTS}, auto=IMAGES),
    Family(
        "qwen2_5_vl",
        "qwen2_5_vl",
        "positions in three parts",
        {"rope_parameters": THREE_PARTS},
        auto=IMAGES,
        quick=True,
    ),
    Family(
        "qwen3_vl",
        "qwen3_vl",
        "the same, interleaved",
        {"rope_parameters": {**THREE_PARTS, "mrope_interleaved": True}},
        auto=IMAGES,
    ),
    Family(
        "qwen3_vl_moe",
        "qwen3_vl_moe",
        "the same with experts",
        {"rope_parameters": {**THREE_PARTS, "mrope_interleaved": True}},
        auto=IMAGES,
    ),
    Family(
        "gemma3",
        "gemma3",
        "a mask that knows images",
        {"layer_types": ["sliding_attention", "full_attention"]},
        auto=IMAGES,
    ),
    Family("llava", "llava", "a tower before any decoder", auto=IMAGES),
    Family("paligemma", "paligemma", "a prefix that sees all of itself", auto=IMAGES, refused=NOT_CAUSAL),
    Family("mistral3", "mistral3", "a tower before a decoder", auto=IMAGES),
    Family("internvl", "internvl", "a tower before a decoder", auto=IMAGES),
    Family("idefics3", "idefics3", "a tower before a decoder", auto=IMAGES),
    Family("aya_vision", "aya_vision", "a scale on the logits", auto=IMAGES),
    Family(
        "llama4",
        "llama4",
        "experts, attention by chunks",
        {"attention_chunk_size": 4, "intermediate_size_mlp": 48},
        vision={"projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
        auto=IMAGES,
    ),
    Family(
        "mllama",
        "mllama",
        "layers that attend to images alone",
        {"cross_attention_layers": [1]},
        vision={
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
        },
        auto=IMAGES,
    ),
)

ENCODERS = (
    Family("t5", "t5", "an encoder and a decoder", auto="Seq2SeqLM", refused=ENCODER_DECODER, quick=True),
    Family("mt5", "mt5", "an encoder and a decoder", auto="Seq2SeqLM", refused=ENCODER_DECODER),
    Family("umt5", "umt5", "an encoder and a decoder", auto="Seq2SeqLM", refused=ENCODER_DECODER),
    Family(
        "bart", "bart", "an encoder and a decoder that makes its own input", auto="Seq2SeqLM", refused=ENCODER_DECODER
    ),
    Family("pegasus", "pegasus", "an encoder and a decoder", auto="Seq2SeqLM", refused=ENCODER_DECODER),
    Family(
        "marian", "marian", "an encoder and a decoder, a bias on the logits", auto="Seq2SeqLM", refused=ENCODER_DECODER
    ),
    Family("bart, decoder", "bart", "the decoder alone", {"is_decoder": True}),
    Family("bert, decoder", "bert", "an encoder made causal", {"is_decoder": True}),
    Family("roberta, decoder", "roberta", "an encoder made causal, positions by padding", {"is_decoder": True}),
    Family("bert", "bert", "every token sees every other", auto="MaskedLM", refused=NOT_CAUSAL),
    Family("bert, both ways", "bert", "every token sees every other, under a causal name", refused=NOT_CAUSAL),
    Family(
        "xlnet", "xlnet", "tokens in any order", {"max_position_embeddings": ..., "d_inner": 48}, refused=NOT_CAUSAL
    ),
)
