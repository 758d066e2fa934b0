"""Layers every network here is made of, with an optional low-rank side path.

Parameter names are PyTorch's: joining a parameter's path with dots gives the key of the
published checkpoint (``kernel``, ``scale`` and ``embedding`` stand for ``weight``), and a
component ``name.i:j`` stands for the modules ``name.i`` .. ``name.(j-1)`` stacked along a leading
axis. `dmdr_jax.diffusers_io.keymap` reads and writes checkpoints by this rule alone.

A LoRA delta is a tree with the same paths and leaves ``{"a", "b"}``, given to ``apply`` as the
variable collection ``lora``. Its scale is an ordinary (traced) argument, a scalar or one number
per batch row, so that one forward pass can serve rows with different scales.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.models.placement import product

Array = jax.Array
LoraScale = Array | float | None

_MAX_PERIOD = 10000.0


def _row_scale(scale: LoraScale, x: Array) -> Array:
    """Shapes a scalar or ``[b]`` scale to multiply ``x`` of shape ``[b, ...]``."""
    scale = jnp.asarray(1.0 if scale is None else scale, x.dtype)
    return scale.reshape(scale.shape + (1,) * (x.ndim - 1)) if scale.ndim else scale


def _matmul(x: Array, kernel: Array) -> Array:
    """``x @ kernel`` over rows flattened to one axis: the CPU compiler runs its weight gradient twice as fast."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> Array:
    """An fp32 parameter of a module, made by ``init`` where there is none yet.

    As `nn.Module.param`, which to check the shape traces ``init`` at every use: a sixth of the time of tracing SDXL.

    Raises:
      ValueError: it is there with another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, jnp.float32)
    there: Any = module.get_variable("params", name)
    if there.shape != shape:
        raise ValueError(f"{'.'.join((*module.path, name))} has the shape {there.shape}, where {shape} is needed")
    return there


class Dense(nn.Module):
    """``x W + b``, plus ``s (x A) B`` where a delta is given (Hu et al. 2021, eq. 3)."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, lora_scale: LoraScale = None) -> Array:
        """Maps ``[b, ..., d_in]`` to ``[b, ..., features]`` in ``dtype``."""
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = product(_matmul, x, kernel, self.dtype)
        if self.has_variable("lora", "kernel"):
            delta: Any = self.get_variable("lora", "kernel")
            low = product(_matmul, x, delta["a"], self.dtype)
            y = y + product(_matmul, low * _row_scale(lora_scale, low), delta["b"], self.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y


class Conv(nn.Module):
    """2-D convolution, NHWC with an HWIO kernel; the delta is a k x k then a 1 x 1 convolution."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int | Sequence[tuple[int, int]] = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array, lora_scale: LoraScale = None) -> Array:
        """Maps ``[b, h, w, c]`` to ``[b, h', w', features]`` in ``dtype``."""
        k = self.kernel_size
        kernel = parameter(self, "kernel", self.kernel_init, (k, k, x.shape[-1], self.features))
        x = x.astype(self.dtype)
        y = product(self._convolve, x, kernel, self.dtype)
        if self.has_variable("lora", "kernel"):
            delta: Any = self.get_variable("lora", "kernel")
            low = product(self._convolve, x, delta["a"], self.dtype) * _row_scale(lora_scale, x)
            y = y + product(lambda low, b: low @ b[0, 0], low, delta["b"], self.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)
        return y

    def _convolve(self, x: Array, kernel: Array) -> Array:
        pad = self.padding
        pads = [(pad, pad), (pad, pad)] if isinstance(pad, int) else list(pad)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, statistics in fp32; affine or not."""

    eps: float
    affine: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide)
        mean = y.mean(-1, keepdims=True)
        y = y - mean
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        if self.affine:
            y = y * parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
            y = y + parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last axis, statistics in fp32."""

    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + self.eps)
        return (y * parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation over ``[b, h, w, c]``, statistics in fp32."""

    groups: int
    eps: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean((1, 3), keepdims=True) + self.eps)
        y = y.reshape(x.shape)
        y = y * parameter(self, "scale", nn.initializers.ones, (x.shape[-1],))
        y = y + parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(self.dtype)


class Embed(nn.Module):
    """A lookup table ``[count, features]``."""

    count: int
    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Array | np.ndarray) -> Array:
        init = nn.initializers.normal(0.02)
        table = parameter(self, "embedding", init, (self.count, self.features))
        return jnp.asarray(table, self.dtype)[ids]


def timestep_embedding(t: Array, dim: int, cosines_first: bool = True, shift: int = 0) -> Array:
    """Sine-cosine features ``[n, dim]`` fp32 of ``t`` ``[n]``, as diffusers' ``Timesteps``.

    Args:
      t: any numbers; times are 0..1000.
      dim: even.
      cosines_first: diffusers' ``flip_sin_to_cos``.
      shift: taken from ``dim / 2`` in the spacing of the frequencies.
    """
    half = dim // 2
    # Large t magnify the last bit of a frequency: exponents in fp32 as diffusers has them, their exponential exact.
    exponents = np.float32(-math.log(_MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half - shift)
    angles = t.astype(jnp.float32)[:, None] * np.exp(exponents.astype(np.float64)).astype(np.float32)
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if cosines_first else waves, axis=-1)


def quick_gelu(x: Array) -> Array:
    """``x sigmoid(1.702 x)``, the activation of OpenAI's and DFN's CLIP."""
    return x * nn.sigmoid(1.702 * x)


def gelu_exact(x: Array) -> Array:
    """GELU by the error function."""
    return nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """GELU by its tanh approximation (PyTorch's ``gelu(approximate="tanh")``, T5's ``gelu_new``)."""
    return nn.gelu(x, approximate=True)
