"""Tiny random models of many families, with inputs that are longer than their windows."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers.models.whisper.modeling_whisper import WhisperEncoder

N = 80
"""Length of the inputs."""
_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 60,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}


def ids(batch: int = 2, n: int = N, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 60, (batch, n), generator=torch.Generator().manual_seed(seed))


def text(side: str = "right", pad: int = 12) -> dict[str, torch.Tensor]:
    """Two rows of token ids, the second padded by 12 on one side."""
    mask = torch.ones(2, N, dtype=torch.long)
    if side == "right":
        mask[1, N - pad :] = 0
    else:
        mask[1, :pad] = 0
    return {"input_ids": ids() * mask, "attention_mask": mask}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _t5() -> Any:
    config = tf.T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=60, decoder_start_token_id=0
    )
    return tf.T5Model(config)


def _gpt2() -> Any:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=60, n_positions=128, bos_token_id=1, eos_token_id=2)
    )


def _whisper() -> Any:
    config = tf.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=N, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return WhisperEncoder(config)


def _vit() -> Any:
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=36, patch_size=4
    )
    return tf.ViTForImageClassification(config)


def _cross() -> Any:
    config = tf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=60, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return tf.BartModel(config)


FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "bert": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**_SHAPE)), text),
    "distilbert": (
        lambda: tf.DistilBertModel(
            tf.DistilBertConfig(
                dim=16, n_layers=2, n_heads=4, hidden_dim=24, vocab_size=60, max_position_embeddings=128
            )
        ),
        text,
    ),
    "vit": (_vit, lambda: {"pixel_values": noise(2, 3, 36, 36)}),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SHAPE, num_key_value_heads=2)), lambda: text("left")),
    "mistral": (
        lambda: tf.MistralModel(tf.MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=16)),
        lambda: text("left"),
    ),
    "gpt2": (_gpt2, lambda: text("left")),
    "gemma3": (
        lambda: tf.Gemma3TextModel(
            tf.Gemma3TextConfig(
                **_SHAPE,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        lambda: text("left"),
    ),
    "clip-vision": (
        lambda: tf.CLIPVisionModel(
            tf.CLIPVisionConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=24,
                image_size=36,
                patch_size=4,
            )
        ),
        lambda: {"pixel_values": noise(2, 3, 36, 36)},
    ),
    "clip-text": (lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**_SHAPE)), text),
    "whisper-encoder": (_whisper, lambda: {"input_features": noise(2, 8, 2 * N)}),
    "modernbert": (
        lambda: tf.ModernBertModel(
            tf.ModernBertConfig(
                **_SHAPE, local_attention=16, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
            )
        ),
        text,
    ),
    "bart": (_cross, lambda: {**text(), "decoder_input_ids": ids(seed=1)}),
    "wav2vec2": (
        lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**_AUDIO, mask_time_prob=0.0)),
        lambda: {
            "input_values": noise(2, 1700),
            "attention_mask": torch.cat([torch.ones(2, 1500), torch.tensor([[1.0], [0.0]]).expand(2, 200)], 1).long(),
        },
    ),
}
"""Families that are patched."""

EXACT: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, torch.Tensor]], str]] = {
    "t5": (_t5, lambda: {**text(), "decoder_input_ids": ids(seed=1)}, "bias"),
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**_SHAPE)), text, "position bias"),
    "deberta": (lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_SHAPE)), text, "relative positions"),
    "wavlm": (
        lambda: tf.WavLMModel(tf.WavLMConfig(**_AUDIO, mask_time_prob=0.0)),
        lambda: {"input_values": noise(2, 1700)},
        "position bias",
    ),
    "gemma2": (
        lambda: tf.Gemma2Model(tf.Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=16)),
        lambda: text("left"),
        "capped",
    ),
}
"""Families that stay exact, and a word of the reason."""


def build(make: Callable[[], Any]) -> Any:
    """The model in eval mode; the same weights on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@torch.no_grad()
def output(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first output: logits or hidden states."""
    found: torch.Tensor = model(**inputs)[0]
    return found
