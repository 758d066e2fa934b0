"""Compiles a small sharded program for a TPU slice; prints what is told of it on the way and at the end, as JSON.

python -m tests.planning.compiler_program
"""

import json
import os
from typing import Any

from dmdr_jax.planning import compiler

# At the usual level the compiler keeps some values in a chip's small memory and counts them with the others at the end.
os.environ.update(compiler.ENVIRONMENT, JAX_OPTIMIZATION_LEVEL="O0")


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from dmdr_jax.planning import hlo, topology
    from dmdr_jax.training import sharding

    mesh = sharding.make_mesh(1, 8, 1, topology.describe_devices(topology.parse("v5e:2x4")))
    split, rows = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec("fsdp"))

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ kernel)

        x, _ = jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)
        return (x**2).mean()

    def update(kernels: jax.Array, x: jax.Array) -> jax.Array:
        return kernels - jax.grad(loss)(kernels, x)

    kernels = jax.ShapeDtypeStruct((12, 1024, 1024), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((65536, 1024), jnp.float32, sharding=rows)
    traced = jax.jit(update, out_shardings=split, donate_argnums=0).trace(kernels, x)

    def facts(compiled: compiler.Compiled) -> dict[str, Any]:
        found = hlo.collectives(compiled.text)
        sent = [hlo.total(found, hlo.GATHER), hlo.total(found, hlo.SCATTER) + hlo.total(found, hlo.REDUCE)]
        return {"sent": sent, "arguments": compiled.arguments, "peak": compiled.peak}

    told = compiler.ask(traced)
    whole = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=compiler.OPTIONS)
    answers = [facts(told) | {"code": compiler.CODE * len(told.text)}]
    answers += [about_the_limit(rows) for rows in (240_000, 260_000)]
    compiler.LAST = "nothing is called so"
    for compiled in (compiler._of_executable(whole), compiler.ask(traced)):
        answers.append(facts(compiled) | {"code": whole.memory_analysis().generated_code_size_in_bytes})
    print(json.dumps(answers), flush=True)
    os._exit(0)


def about_the_limit(rows: int) -> dict[str, Any]:
    """A program that about fills a v5e chip: what is told of its memory, and by the executable or why there is none."""
    import jax
    import jax.numpy as jnp

    from dmdr_jax.planning import topology

    here = jax.sharding.SingleDeviceSharding(topology.describe_devices(topology.parse("v5e-1"))[0])

    def loss(kernels: jax.Array, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, kernel: jnp.tanh(jnp.tanh(x @ kernel) @ kernel.T) + x)
        x, _ = jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)
        return (x**2).mean()

    kernels = jax.ShapeDtypeStruct((12, 1024, 1024), jnp.float32, sharding=here)
    x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32, sharding=here)
    traced = jax.jit(jax.grad(loss)).trace(kernels, x)
    told = compiler.ask(traced)
    found: dict[str, Any] = {"told": told.arguments + told.temp - compiler.CODE * len(told.text)}
    try:
        memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    except RuntimeError as error:
        return found | {"refused": str(error)}
    return found | {"said": memory.argument_size_in_bytes + memory.temp_size_in_bytes}


if __name__ == "__main__":
    main()
