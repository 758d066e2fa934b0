"""Programs that need devices this process has not: run by tests in a process of their own.

python -m tests.models.attention_programs mesh                 # eight CPU devices
python -m tests.models.attention_programs compile v5e:2x2      # described TPUs, through libtpu's compiler
"""

import json
import os
import sys
from typing import Any

CASES = {"self": (4429, 4429, 24, 64), "cross": (4096, 1178, 10, 64), "pixels": (4096, 4096, 1, 512)}


def mesh() -> dict[str, float]:
    """Greatest error of the sharded kernel against plain attention, by where the mesh is known from."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    from dmdr_jax.models.attention import PLAIN, AttentionKernel, attention
    from dmdr_jax.training.sharding import make_mesh

    devices = make_mesh(2, 4)
    kernel = AttentionKernel("splash", devices, min_tokens=1, block=128, interpret=True)
    rng = np.random.default_rng(0)
    key_bias = jnp.zeros(70).at[3].set(5.5)

    def error(rows, kernel, about=None, queries=64):
        q, k, v = (rng.normal(size=(rows, n, 2, 64)).astype(np.float32) for n in (queries, 70, 70))
        split = NamedSharding(devices, PartitionSpec(("data", "fsdp")) if rows % 8 == 0 else PartitionSpec())
        q, k, v = jax.device_put((q, k, v), split)

        def grads(kernel):
            def loss(q, k, v):
                return (attention(q, k, v, key_bias=key_bias, kernel=kernel) ** 2).sum()

            return jax.jit(about(jax.grad(loss, (0, 1, 2))) if about else jax.grad(loss, (0, 1, 2)))(q, k, v)

        return max(float(abs(a - b).max()) for a, b in zip(grads(kernel), grads(PLAIN)))

    def inside(mesh):
        def about(function):
            def run(*arrays):
                with jax.sharding.use_abstract_mesh(mesh):
                    return function(*arrays)

            return run

        return about

    def mapped(function):
        rows = PartitionSpec(("data", "fsdp"))
        return jax.shard_map(function, mesh=devices, in_specs=(rows,) * 3, out_specs=(rows,) * 3, check_vma=False)

    bare = dataclasses.replace(kernel, mesh=None)
    return {
        "attribute": error(8, kernel),
        "context": error(8, bare, inside(devices.abstract_mesh)),
        "both": error(8, kernel, inside(devices.abstract_mesh)),
        "hidden context": error(8, kernel, inside(AbstractMesh((), ()))),
        "inside shard_map": error(8, kernel, mapped),
        "some axes": error(4, kernel),
        "one row": error(1, kernel),
        "queries that do not divide": error(2, kernel, queries=63),
    }


def compile_for(topology: str) -> dict[str, Any]:
    """Temporary memory in GB of the gradient of splash attention by case, and how often a kernel runs by what is
    rematerialised ("kernels"). The programs are not run."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies as described
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from dmdr_jax.models.attention import attention, kernel_for
    from dmdr_jax.models.remat import remat

    def compiled(function, *arrays):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()

    def temporary(mesh, n, m, heads, width):
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        kernel, dtype = kernel_for("auto", mesh), jnp.float32 if width > 64 else jnp.bfloat16
        arrays = [jax.ShapeDtypeStruct((mesh.size, x, heads, width), dtype, sharding=rows) for x in (n, m, m)]
        key_bias = jnp.zeros(m).at[-1].set(5.5)

        def loss(q, k, v):
            return attention(q, k, v, key_bias=key_bias, kernel=kernel).astype(jnp.float32).sum()

        program = compiled(jax.grad(loss, (0, 1, 2)), *arrays)
        assert "tpu_custom_call" in program.as_text()
        assert "all-gather" not in program.as_text()
        return program.memory_analysis().temp_size_in_bytes / 1e9

    def kernels(mesh, choice):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                y = nn.Dense(64)(x)[:, :, None]
                return x + nn.Dense(64)(attention(y, y, y, kernel=kernel_for("auto", mesh))[:, :, 0])

        block, x = remat(Block, choice, in_scan=False)(), jnp.zeros((mesh.size, 1024, 64))
        params = jax.eval_shape(block.init, jax.random.key(0), x)
        whole = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=whole), params)
        program = compiled(jax.grad(lambda params: (block.apply(params, x) ** 2).sum()), params)
        return program.as_text().count('custom_call_target="tpu_custom_call"')

    devices = described.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh([devices[:2], devices[2:4]], ("data", "fsdp"))
    found: dict[str, Any] = {case: temporary(mesh, *shape) for case, shape in CASES.items()}
    return found | {"kernels": {choice: kernels(mesh, choice) for choice in ("none", "names", "full")}}


if __name__ == "__main__":
    if sys.argv[1] == "mesh":
        print(json.dumps(mesh()))
    else:
        os.environ.setdefault("JAX_OPTIMIZATION_LEVEL", "O0")
        print(json.dumps(compile_for(sys.argv[2])))
