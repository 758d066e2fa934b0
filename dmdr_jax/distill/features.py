"""Features of latents inside a denoiser: for a discriminator (DMD2) and for drifts in feature space (DrPO).

Nothing is added to the networks: the outputs of named layers are caught on the way. Of a transformer those of its last
normalisation are, of a U-Net those of its narrowest part (and, for drifts, of its neighbours). Layers inside a scan
over blocks cannot be caught.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dmdr_jax import lora
from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.models.conditioning import Conditioning

Array = jax.Array
Features = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """Which features.

    Attributes:
      layers: names of submodules of the denoiser.
      time: the noise level at which the latents are shown to it.
      cells: the features are averaged to at most this many cells along height and width.
    """

    layers: tuple[str, ...]
    time: float = 0.1
    cells: int = 4


def feature_layers(module: nn.Module, wide: bool = False) -> tuple[str, ...]:
    """The layers to look at in a denoiser: one, or with ``wide`` also those around it where there are any."""
    config = module.config
    if not hasattr(config, "mid_level"):
        return ("norm_out",)
    middle = f"mid_block.resnets.{len(config.mid_level().depths) - 1}"
    down = config.down_levels()
    around = f"down_blocks.{len(down) - 1}.resnets.{len(down[-1].depths) - 1}", "up_blocks.0.resnets.0"
    return (around[0], middle, around[1]) if wide else (middle,)


def feature_width(module: nn.Module) -> int:
    """The width of `feature_layers`' one layer."""
    config = module.config
    return config.block_out_channels[-1] if hasattr(config, "mid_level") else config.width


def with_features(
    denoiser: Denoiser, weights: Weights, z: Array, t: Array, cond: Conditioning, layers: tuple[str, ...]
) -> tuple[Array, Features]:
    """The output of `Denoiser.output` and the layers': maps ``[b, h', w', d]`` or tokens ``[b, n, d]``, fp32."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), z.shape[:1])
    out, caught = denoiser.module.apply(
        lora.variables(weights.params, weights.lora),
        z,
        denoiser.process.model_time(t),
        cond.prompt_embeds,
        cond.pooled,
        lora_scale=weights.lora_scale,
        capture_intermediates=lambda module, method: module.name in layers and method == "__call__",
        mutable=["intermediates"],
        **cond.extras,
    )
    features = {name: _first(caught["intermediates"][name]["__call__"]) for name in layers}
    wide = jnp.promote_types(out.dtype, jnp.float32)
    return out.astype(wide), {name: x.astype(wide) for name, x in features.items()}


def pooled(features: Features, height: int, width: int, cells: int) -> Features:
    """Flat features ``[b, cells' * d]``: maps averaged to at most ``cells`` x ``cells``; tokens are a map of latents.

    Args:
      height, width: of the latents, whose proportions tokens have.
    """
    return {name: _pool(x, height, width, cells) for name, x in features.items()}


def _pool(x: Array, height: int, width: int, cells: int) -> Array:
    if x.ndim == 3:
        patch = round((height * width / x.shape[1]) ** 0.5)
        x = x.reshape(x.shape[0], height // patch, width // patch, -1)
    for axis in (1, 2):
        size = x.shape[axis]
        count = max(n for n in range(1, min(cells, size) + 1) if size % n == 0)
        x = x.reshape(*x.shape[:axis], count, size // count, *x.shape[axis + 1 :]).mean(axis + 1)
    return x.reshape(x.shape[0], -1)


def _first(caught: Any) -> Array:
    """The array of a layer's output: the whole, or the first of several."""
    return jax.tree.leaves(caught)[0]
