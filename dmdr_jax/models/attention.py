"""The one attention function of every network here, and the device kernels it may use.

Short sequences are computed plainly, in XLA. From about a thousand tokens on, a network whose `AttentionKernel` says so
uses splash attention on TPU (`jax.experimental.pallas.ops.tpu.splash_attention`) or cuDNN's on GPU, which never hold
the ``[n, m]`` weights in memory. The choice is static: made by `kernel_for` from a device's kind, then by `attention`
from shapes and types while tracing, so that a program compiled ahead of time for other devices is theirs.

The kernels have a gradient, but neither forward-mode nor higher derivatives: where these are wanted, use `PLAIN`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from dmdr_jax.errors import UserError
from dmdr_jax.models.placement import BATCH_AXES
from dmdr_jax.models.remat import ATTENTION_NAME, name_attention

Array = jax.Array

KERNELS = ("auto", "plain", "splash", "cudnn")

_LANES = 128
# Above these a block no longer fits the vector memory of a core (compiled for 64-wide heads, forward and backward).
_LARGEST_BLOCK = 1024
_LARGEST_BLOCK_V6 = 1536
_LARGEST_BLOCK_OF_WIDE_HEADS = 256  # wider than the 128 lanes of a register: the image codec's 512
_LARGEST_CUDNN_HEAD = 128
# As a logit, indistinguishable from -inf, and finite in every type.
_HIDDEN = -3e4


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
    """How a network computes attention over long sequences. Static: an attribute of modules, as their dtype is.

    Attributes:
      kind: "plain", "splash" or "cudnn".
      mesh: whose axes data and fsdp split the batch; None on one device. A kernel is a call that XLA cannot split, so
        with a mesh each device calls it on its rows. A mesh about the code (`jax.sharding.use_abstract_mesh`) goes
        before this one.
      min_tokens: queries and keys below which attention is plain.
      block: largest block of splash attention, a multiple of 128.
      interpret: run splash attention by the interpreter, on any device.
    """

    kind: str = "plain"
    mesh: Mesh | None = None
    min_tokens: int = 1024
    block: int = _LARGEST_BLOCK
    interpret: bool = False

    def takes(self, query: Array, key: Array) -> bool:
        """Whether it computes attention of these ``[b, n, k, d]``; what it does not take is computed plainly."""
        if self.kind == "plain" or min(query.shape[1], key.shape[1]) < self.min_tokens:
            return False
        if self.kind == "splash":
            return query.dtype in (jnp.bfloat16, jnp.float32)
        return query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] + 8 <= _LARGEST_CUDNN_HEAD


PLAIN = AttentionKernel()


def kernel_for(choice: str = "auto", mesh: Mesh | None = None, device: jax.Device | None = None) -> AttentionKernel:
    """The kernel for a mesh, or for one device.

    Args:
      choice: "plain", "splash" or "cudnn"; or "auto": splash on TPU, cuDNN on a GPU that has it, else plain. Splash
        attention is interpreted where there is no TPU, which is slow and meant for tests.
      mesh: may consist of devices that are only described (`jax.experimental.topologies`).
      device: where there is no mesh; the default one where there is neither.

    Raises:
      UserError: no such choice, or cuDNN without a GPU.
    """
    if choice not in KERNELS:
        raise UserError(f"attention {choice!r} is unknown; choose one of {', '.join(KERNELS)}.")
    device = mesh.devices.flat[0] if mesh is not None else device or jax.devices()[0]
    on_tpu, on_gpu = device.platform == "tpu", device.platform in ("gpu", "cuda")
    if choice == "auto":
        choice = "splash" if on_tpu else "cudnn" if on_gpu and _has_cudnn(device) else "plain"
    if choice == "cudnn" and not on_gpu:
        raise UserError(f"attention 'cudnn' needs an NVIDIA GPU, and this is a {device.device_kind}; choose 'auto'.")
    block = _LARGEST_BLOCK_V6 if "v6" in device.device_kind else _LARGEST_BLOCK
    return AttentionKernel(choice, mesh, block=block, interpret=not on_tpu)


def _has_cudnn(device: jax.Device) -> bool:
    """Flash attention with a backward pass needs Ampere or newer."""
    return float(getattr(device, "compute_capability", 0.0)) >= 8.0


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    key_bias: Array | None = None,
    bias: Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    kernel: AttentionKernel = PLAIN,
) -> Array:
    """``softmax(scale q k^T + bias) v``, logits and softmax in at least fp32.

    The output bears the name that the rematerialisation "names" keeps.

    Args:
      query: ``[b, n, k, d]``, k heads of width d.
      key: ``[b, m, k, d]``.
      value: ``[b, m, k, d]``.
      key_bias: ``[m]`` or ``[b, m]``, added to the logits of each key for every query and head. A key with bias
        log c counts as c identical keys; -inf hides it.
      bias: broadcastable to ``[b, k, n, m]``, added to the logits; computed plainly.
      scale: ``d ** -0.5`` where not given.
      causal: query i sees keys 0..i only; computed plainly.
      kernel: what to compute long sequences with.

    Returns:
      ``[b, n, k, d]`` in ``query.dtype``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key_bias is not None:
        key_bias = jnp.atleast_2d(key_bias)
    if bias is None and not causal and kernel.takes(query, key):
        call = functools.partial(_splash, kernel) if kernel.kind == "splash" else _cudnn
        return _on_devices(kernel.mesh, functools.partial(call, scale), query, key, value, key_bias)
    y = _plain(query, key, value, key_bias, bias, scale, causal)
    # Named without heads: 64-wide rows would be padded to twice their size where they are kept.
    return name_attention(merge_heads(y)).reshape(y.shape)


def _plain(
    query: Array,
    key: Array,
    value: Array,
    key_bias: Array | None,
    bias: Array | None,
    scale: float,
    causal: bool,
) -> Array:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum("bnkd,bmkd->bknm", query, key, preferred_element_type=wide) * scale
    if bias is not None:
        logits = logits + bias.astype(wide)
    if key_bias is not None:
        logits = logits + key_bias.astype(wide)[:, None, None, :]
    if causal:
        visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(visible, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, value)


def _on_devices(
    mesh: Mesh | None, call: Callable[..., Array], query: Array, key: Array, value: Array, key_bias: Array | None
) -> Array:
    """The call on each device's rows ``[b / devices, ...]``; arrays of one row are whole everywhere.

    Inside a `jax.shard_map` over the mesh the rows are the device's own already. An axis that does not divide the batch
    divides the queries, and where it cannot it repeats the computation.
    """
    arrays = query, key, value, key_bias
    context = jax.sharding.get_abstract_mesh()
    around: Mesh | AbstractMesh | None = context if context.axis_names else mesh
    if around is None or around.size == 1 or set(around.axis_names) <= set(context.manual_axes):
        return call(*arrays)
    rows, queries = query.shape[:2]
    of_rows: tuple[str, ...] = ()
    of_queries: tuple[str, ...] = ()
    for axis in BATCH_AXES:
        parts = around.shape.get(axis, 1)
        if parts == 1 or axis in context.manual_axes:
            continue
        if rows % parts == 0:
            of_rows, rows = (*of_rows, axis), rows // parts
        elif queries % parts == 0:
            of_queries, queries = (*of_queries, axis), queries // parts
    split = PartitionSpec(of_rows or None, of_queries or None)
    specs = [PartitionSpec() if x is None or x.shape[0] == 1 else PartitionSpec(of_rows or None) for x in arrays[1:]]
    return jax.shard_map(call, mesh=around, in_specs=(split, *specs), out_specs=split, check_vma=False)(*arrays)


def _splash(
    kernel: AttentionKernel, scale: float, query: Array, key: Array, value: Array, key_bias: Array | None
) -> Array:
    """Splash attention of ``[b, n, k, d]``, padded to whole blocks; the padding's keys are another segment."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    n, m = query.shape[1], key.shape[1]
    query, key = _with_bias_columns((query * scale).astype(query.dtype), key, key_bias)
    largest = min(kernel.block, _LARGEST_BLOCK_OF_WIDE_HEADS) if value.shape[-1] > _LANES else kernel.block
    block_q, block_kv = fitting_block(n, largest), fitting_block(m, largest)
    query, key, value = (_heads_first(x, block) for x, block in ((query, block_q), (key, block_kv), (value, block_kv)))
    shape = query.shape[1], query.shape[2], key.shape[2]
    run = _splash_kernel(shape, block_q, block_kv, kernel.interpret)
    segments = None
    if shape[2] > m:
        # Queries of the padding attend to the true keys, so that no row of the softmax is empty; they are cut off.
        segments = splash.SegmentIds(jnp.zeros(shape[1], jnp.int32), (jnp.arange(shape[2]) >= m).astype(jnp.int32))
    y = jax.vmap(lambda q, k, v: run(q, k, v, segment_ids=segments))(query, key, value)
    return y[:, :, :n].swapaxes(1, 2)


def _splash_kernel(shape: tuple[int, int, int], block_q: int, block_kv: int, interpret: bool) -> Callable[..., Array]:
    """The kernel for (heads, queries, keys). Backward in two passes: one fused pass needs over twice the memory."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, n, m = shape
    blocks = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        mask=masks.MultiHeadMask([masks.FullMask((n, m))] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_NAME,
        interpret=interpret,
    )


def fitting_block(length: int, largest: int) -> int:
    """A block for ``length`` tokens, a multiple of 128: the least padding, and of equals the largest block.

    Blocks under half the largest are for lengths that are no longer than that.
    """
    smallest = min(largest // 2, -(-length // _LANES) * _LANES)
    candidates = range(max(smallest // _LANES, 1) * _LANES, largest + 1, _LANES)
    return min(candidates, key=lambda block: (-(-length // block) * block, -block))


def _heads_first(x: Array, block: int) -> Array:
    """``[b, n, k, d]`` to ``[b, k, n', d]`` with n' the next multiple of the block, filled with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


def _cudnn(scale: float, query: Array, key: Array, value: Array, key_bias: Array | None) -> Array:
    """cuDNN's flash attention; all heads have one width there."""
    width = value.shape[-1]
    if key_bias is not None:
        query, key = _with_bias_columns((query * scale).astype(query.dtype), key, key_bias)
        value, scale = _widened(value, query.shape[-1]), 1.0
    y = jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")
    return y[..., :width]


def _with_bias_columns(query: Array, key: Array, key_bias: Array | None) -> tuple[Array, Array]:
    """Queries and keys whose products are ``q k + key_bias``, exact to fp32 whatever the type of the heads.

    The bias is a sum of parts that the type holds exactly, each a column of the keys beside a column of ones of the
    queries. Heads of 64 are padded to 128 by the hardware, so the columns cost no time there.
    """
    if key_bias is None:
        return query, key
    b, m, heads, width = key.shape
    rest, parts = jnp.maximum(key_bias.astype(jnp.float32), _HIDDEN), []
    for _ in range(1 if key.dtype == jnp.float32 else 3):
        parts.append(rest.astype(key.dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    columns = jnp.broadcast_to(jnp.stack(parts, -1)[:, :, None], (b, m, heads, len(parts)))
    ones = jnp.ones((*query.shape[:-1], len(parts)), query.dtype)
    total = width + len(parts) + -(width + len(parts)) % 8
    query, key = (_widened(jnp.concatenate(pair, -1), total) for pair in ((query, ones), (key, columns)))
    return query, key


def _widened(x: Array, width: int) -> Array:
    """The last axis filled with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def split_heads(x: Array, heads: int) -> Array:
    """``[b, n, k * d]`` to ``[b, n, k, d]``."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """``[b, n, k, d]`` to ``[b, n, k * d]``."""
    return x.reshape(*x.shape[:-2], -1)
