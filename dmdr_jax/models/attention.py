"""The one attention function of every network here.

Networks call `attention`; a device kernel (splash or flash attention) belongs in `attention` alone, chosen
there from the shapes and the backend, with the XLA path below as its reference.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    key_bias: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Array:
    """``softmax(scale q k^T + bias) v``, logits and softmax in at least fp32.

    Args:
      query: ``[b, n, k, d]``, k heads of width d.
      key: ``[b, m, k, d]``.
      value: ``[b, m, k, d]``.
      key_bias: ``[m]`` or ``[b, m]``, added to the logits of each key for every query and head. A key with bias
        log c counts as c identical keys; -inf hides it.
      bias: broadcastable to ``[b, k, n, m]``, added to the logits.
      scale: ``d ** -0.5`` where not given.
      causal: query i sees keys 0..i only.

    Returns:
      ``[b, n, k, d]`` in ``query.dtype``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bnkd,bmkd->bknm", query, key, preferred_element_type=wide) * scale
    if bias is not None:
        logits = logits + bias.astype(wide)
    if key_bias is not None:
        key_bias = jnp.atleast_2d(key_bias).astype(wide)
        logits = logits + key_bias[:, None, None, :]
    if causal:
        visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, value)


def split_heads(x: Array, heads: int) -> Array:
    """``[b, n, k * d]`` to ``[b, n, k, d]``."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """``[b, n, k, d]`` to ``[b, n, k * d]``."""
    return x.reshape(*x.shape[:-2], -1)
