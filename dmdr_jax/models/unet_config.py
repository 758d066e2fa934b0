"""The shape of SDXL's U-Net, read from diffusers' ``unet/config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dmdr_jax.errors import UserError

PerLevel = int | tuple[int, ...]
Depths = int | tuple[int | tuple[int, ...], ...]

# Original height and width, top and left of the crop, target height and width.
TIME_IDS = 6
_DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
# Settings under which diffusers builds another network, with the values (the first its default) that mean this one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False, None),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    # Logits and softmax are at least fp32 here in any case.
    "upcast_attention": (False, None, True),
}
# Settings of embeddings that this network does not have.
_UNUSED = ("addition_embed_type_num_heads",)
_NUMBERS = (
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "in_channels",
    "out_channels",
    "norm_num_groups",
    "cross_attention_dim",
)
_PER_LEVEL_FIELDS = (
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution on the way down or up, or the middle.

    Attributes:
      features: width.
      depths: per resnet, how many transformer blocks follow it; None where no spatial transformer does.
      heads: of its attention.
    """

    features: int
    depths: tuple[int | None, ...]
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the network, in the names and defaults of diffusers' ``UNet2DConditionModel``.

    ``attention_head_dim`` is the *number* of heads: diffusers keeps a misnomer for the sake of published files.
    """

    addition_time_embed_dim: int
    projection_class_embeddings_input_dim: int
    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*(3 * ("CrossAttnDownBlock2D",)), "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *(3 * ("CrossAttnUpBlock2D",)))
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerLevel = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: Depths = 1
    reverse_transformer_layers_per_block: Depths | None = None
    attention_head_dim: PerLevel = 8
    use_linear_projection: bool = False

    def __post_init__(self):
        _check_numbers(self)
        _check_blocks(self)
        _check_depths(self)
        _check_widths(self)

    @property
    def levels(self) -> int:
        """How many resolutions there are."""
        return len(self.block_out_channels)

    @property
    def patch_size(self) -> int:
        """Latent pixels per token along one side: any latent size will do."""
        return 1

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled text that goes with `TIME_IDS` time ids."""
        return self.projection_class_embeddings_input_dim - TIME_IDS * self.addition_time_embed_dim

    def down_levels(self) -> tuple[Level, ...]:
        """The levels from the highest resolution to the lowest."""
        layers = _per_level(self.layers_per_block, self.levels)
        return self._zip(self.down_block_types, layers, self.transformer_layers_per_block, slice(None))

    def up_levels(self) -> tuple[Level, ...]:
        """The levels from the lowest resolution to the highest, with one more resnet each than on the way down."""
        layers = tuple(n + 1 for n in _per_level(self.layers_per_block, self.levels)[::-1])
        depths = self.reverse_transformer_layers_per_block
        if depths is None:
            depths = _per_level(self.transformer_layers_per_block, self.levels)[::-1]
        return self._zip(self.up_block_types, layers, depths, slice(None, None, -1))

    def mid_level(self) -> Level:
        """The middle: two resnets about a spatial transformer, one resnet, or nothing."""
        depth = _iterate(_per_level(self.transformer_layers_per_block, self.levels)[-1])[0]
        depths = {"UNetMidBlock2DCrossAttn": (depth, None), "UNetMidBlock2D": (None,), None: ()}[self.mid_block_type]
        return Level(self.block_out_channels[-1], depths, _per_level(self.attention_head_dim, self.levels)[-1])

    def _zip(self, kinds: tuple[str, ...], layers: tuple[int, ...], depths: Depths, order: slice) -> tuple[Level, ...]:
        """Levels in ``order``, from lists that are in it already but for widths and heads."""
        heads = _per_level(self.attention_head_dim, self.levels)
        depths = _per_level(depths, self.levels)
        levels = []
        for kind, n, depth, width, k in zip(kinds, layers, depths, self.block_out_channels[order], heads[order]):
            # diffusers reads only as many of the depths as there are resnets.
            blocks: tuple[int | None, ...] = (None,) * n
            if kind.startswith("CrossAttn"):
                blocks = _per_level(depth, n)[:n]
            levels.append(Level(width, blocks, k))
        return tuple(levels)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads a ``unet/config.json``.

        Raises:
          UserError: the file is another model's, or has a key or a value that this network does not know.
        """
        kind = config.get("_class_name", "UNet2DConditionModel")
        if kind != "UNet2DConditionModel":
            raise UserError(f"unet config: expected a UNet2DConditionModel, found a {kind}.")
        values = {k: _frozen(v) for k, v in config.items() if not k.startswith("_") and k not in _UNUSED}
        # diffusers' default is another conditioning, so that this key may not be left out.
        _check_fixed({"addition_embed_type": None, **values})
        values = {k: v for k, v in values.items() if k not in _FIXED}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise UserError(f"unet config: unknown keys {unknown}; known are {sorted({*fields, *_FIXED})}.")
        for name, field in fields.items():
            if field.default is dataclasses.MISSING and name not in values:
                raise UserError(f"unet config: {name} is missing; text_time conditioning needs it.")
        values["cross_attention_dim"] = _same(values.get("cross_attention_dim", cls.cross_attention_dim))
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` that diffusers reads back as the same network."""
        fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
        values = {f.name: _thawed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"_class_name": "UNet2DConditionModel", **fixed, **values}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value


def _same(value: Any) -> Any:
    """One number for a list of equal ones."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def _per_level(value: Any, count: int) -> tuple:
    return value if isinstance(value, tuple) else (value,) * count


def _count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_fixed(values: Mapping[str, Any]) -> None:
    for key, allowed in _FIXED.items():
        value = _same(values.get(key, allowed[0]))
        if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed):
            only = " or ".join(repr(other) for other in allowed)
            raise UserError(f"unet config: {key}={value!r} is not supported, only {only} is.")


def _check_numbers(config: UNetConfig) -> None:
    """Every number is one, and every list has one entry per level."""
    if not isinstance(config.block_out_channels, tuple) or not config.block_out_channels:
        raise UserError(f"unet config: block_out_channels is {config.block_out_channels!r}, expected a list.")
    for name in _NUMBERS:
        if not _count(getattr(config, name)):
            raise UserError(f"unet config: {name} is {getattr(config, name)!r}, expected a positive integer.")
    for name in _PER_LEVEL_FIELDS:
        value = getattr(config, name)
        if value is None and name.startswith("reverse"):
            continue
        depth = name.endswith("transformer_layers_per_block")
        if not all(_count(v, least=0 if depth else 1) for v in (_flat(value) if depth else _iterate(value))):
            raise UserError(f"unet config: {name} is {value!r}, expected one positive integer, or one per level.")
        _check_length(name, _per_level(value, config.levels), config.levels)


def _flat(value: Any) -> list:
    return [leaf for v in value for leaf in _flat(v)] if isinstance(value, tuple) and value else [value]


def _check_length(name: str, values: tuple, levels: int) -> None:
    if len(values) != levels:
        raise UserError(f"unet config: {name} has {len(values)} entries for {levels} block_out_channels.")


def _check_blocks(config: UNetConfig) -> None:
    """Block types are known ones, one per level."""
    for name, known in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        kinds = getattr(config, name)
        if not isinstance(kinds, tuple) or set(kinds) - set(known):
            raise UserError(f"unet config: {name} {kinds!r} is not supported, only {' and '.join(known)} are.")
        _check_length(name, kinds, config.levels)
    if config.mid_block_type not in _MID_BLOCKS:
        only = ", ".join(map(str, _MID_BLOCKS))
        raise UserError(f"unet config: mid_block_type {config.mid_block_type!r} is not supported, only {only} are.")


def _check_depths(config: UNetConfig) -> None:
    """Depths that are given for each resnet cover all resnets."""
    depths, layers = config.transformer_layers_per_block, _per_level(config.layers_per_block, config.levels)
    if config.reverse_transformer_layers_per_block is None and any(isinstance(d, tuple) for d in _iterate(depths)):
        raise UserError("unet config: nested transformer_layers_per_block need reverse_transformer_layers_per_block.")
    counts = (*layers, *(n + 1 for n in layers[::-1]))
    for level, count in zip((*config.down_levels(), *config.up_levels()), counts, strict=True):
        if len(level.depths) < count:
            raise UserError(
                f"unet config: {level.depths} transformer_layers_per_block are too few for {count} resnets."
            )


def _iterate(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _check_widths(config: UNetConfig) -> None:
    """Groups and heads divide the widths they split."""
    groups = config.norm_num_groups
    if any(width % groups for width in config.block_out_channels):
        raise UserError(f"unet config: norm_num_groups={groups} does not divide {config.block_out_channels}.")
    if config.addition_time_embed_dim % 2 or config.block_out_channels[0] % 2:
        raise UserError("unet config: addition_time_embed_dim and block_out_channels[0] must be even.")
    if config.pooled_dim < 1:
        raise UserError(
            f"unet config: projection_class_embeddings_input_dim {config.projection_class_embeddings_input_dim} leaves"
            f" no room for a pooled text beside {TIME_IDS} times addition_time_embed_dim"
            f" {config.addition_time_embed_dim}."
        )
    for level in (*config.down_levels(), config.mid_level(), *config.up_levels()):
        if level.features % level.heads and any(depth is not None for depth in level.depths):
            raise UserError(
                f"unet config: attention_head_dim (the number of heads) {level.heads} does not divide the width"
                f" {level.features} of its level."
            )
