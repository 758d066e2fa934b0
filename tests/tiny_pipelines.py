"""Random Stable Diffusion 3 and XL pipelines of a few thousand parameters, built in PyTorch and saved by diffusers."""

import json
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dmdr_jax.shapes.tokenizer import make_tokenizers
from tests.torch_weights import randomise

for library in (diffusers, transformers):
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()

CONTEXT = 16
WORDS = ("a", "photo", "of", "red", "blue", "green", "circle", "square", "and", "two")
PROMPTS = ["a photo of a red circle", "two blue squares and a green cat, 3 + 4!", ""]

_CLIP_WIDTHS = (16, 24)
_PROJECTIONS = (16, 24)
_T5_WIDTH = 48

# What tells the published shapes apart.
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3_no_t5": {},
    "sd35_medium": {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    "sd35_large": {"qk_norm": "rms_norm", "num_layers": 5},
}

# SDXL's own scheduler, and one of a model that predicts v.
_SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_KINDS: dict[str, dict[str, Any]] = {
    "sdxl": {"timestep_spacing": "leading", "steps_offset": 1},
    "sdxl_v": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
}


def build(kind: str = "sd3", seed: int = 0) -> DiffusionPipeline:
    """A random pipeline.

    ``sd3``, ``sd3_no_t5``, ``sd35_medium`` (dual attention), ``sd35_large`` (RMS norms), ``sdxl``, or ``sdxl_v``, which
    predicts v and whose absent prompt is the empty one.
    """
    if kind in SDXL_KINDS:
        return _build_sdxl(kind, seed)
    has_t5 = kind != "sd3_no_t5"
    tokenizers = make_tokenizers(WORDS, CONTEXT)
    encoders = [
        randomise(CLIPTextModelWithProjection(_clip_config(i, len(tokenizers[i]), tokenizers[i])), seed + i)
        for i in (0, 1)
    ]
    t5_tokenizer = make_t5_tokenizer() if has_t5 else None
    t5 = _make_t5(len(t5_tokenizer), seed + 2) if has_t5 else None
    transformer = SD3Transformer2DModel(**_transformer_config(kind))
    table = transformer.pos_embed.pos_embed.clone()
    randomise(transformer, seed + 3)
    transformer.pos_embed.pos_embed.copy_(table)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=randomise(AutoencoderKL(**_vae_config()), seed + 4),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def save(folder: Path, kind: str = "sd3", dtype: torch.dtype | None = None, **options: Any) -> Path:
    """Builds and saves a pipeline; options as ``save_pretrained`` (``variant``, ``max_shard_size``)."""
    pipe = build(kind)
    if dtype is not None:
        pipe.to(dtype=dtype)
    pipe.save_pretrained(folder, **options)
    return folder


def _build_sdxl(kind: str, seed: int) -> StableDiffusionXLPipeline:
    tokenizers = make_tokenizers(WORDS, CONTEXT)
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = [randomise(classes[i](_clip_config(i, len(tokenizers[i]), tokenizers[i])), seed + i) for i in (0, 1)]
    return StableDiffusionXLPipeline(
        unet=randomise(UNet2DConditionModel(**_unet_config()), seed + 3),
        scheduler=EulerDiscreteScheduler(**_SDXL_NOISE, **SDXL_KINDS[kind]),
        vae=randomise(AutoencoderKL(**_vae_config() | {"shift_factor": None, "use_quant_conv": True}), seed + 4),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        force_zeros_for_empty_prompt=kind == "sdxl",
        add_watermarker=False,
    )


def load(folder: Path, **options: Any) -> DiffusionPipeline:
    """The folder as diffusers reads it, silent and in fp32.

    diffusers wants to be told in the call where a folder has no T5.
    """
    index = json.loads((Path(folder) / "model_index.json").read_text())
    if index.get("text_encoder_3", [""])[0] is None:
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    if index["_class_name"] == "StableDiffusionXLPipeline":
        options |= {"add_watermarker": False}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_t5_tokenizer() -> T5Tokenizer:
    """A unigram tokenizer of the words, their prefixes and single letters, without any file."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789+,.!"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0 - i / 10) for i, word in enumerate(WORDS)]
    pieces += [(letter, -8.0 - i / 100) for i, letter in enumerate(letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def _clip_config(i: int, vocabulary: int, tokenizer: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=_CLIP_WIDTHS[i],
        intermediate_size=32,
        projection_dim=_PROJECTIONS[i],
        num_hidden_layers=2 + i,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act=("quick_gelu", "gelu")[i],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2,
        pad_token_id=1,
    )


def _make_t5(vocabulary: int, seed: int) -> T5EncoderModel:
    """A random encoder; T5 does not scale its attention logits, its queries' weights do."""
    encoder = randomise(T5EncoderModel(_t5_config(vocabulary)), seed)
    for name, p in encoder.named_parameters():
        if name.endswith("SelfAttention.q.weight"):
            p.mul_(encoder.config.d_kv**-0.5)
    return encoder


def _t5_config(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=vocabulary,
        d_model=_T5_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
        use_cache=False,
    )


def _transformer_config(kind: str) -> dict[str, Any]:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": _T5_WIDTH,
        "caption_projection_dim": 16,
        "pooled_projection_dim": sum(_PROJECTIONS),
        "pos_embed_max_size": 12,
    }
    return {**config, **KINDS[kind]}


def _unet_config() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 4,
        "cross_attention_dim": sum(_CLIP_WIDTHS),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + _PROJECTIONS[1],
    }


def _vae_config() -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
        "latent_channels": 4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
