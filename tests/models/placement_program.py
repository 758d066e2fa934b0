"""Compiles the gradient of a layer with a split kernel for a TPU slice; prints what is summed whole, as JSON.

python -m tests.models.placement_program 3,3,960,640 1536,64
"""

import json
import os
import sys
from functools import partial

from dmdr_jax.planning.compiler import ENVIRONMENT, OPTIONS

os.environ.update(ENVIRONMENT)


def main() -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from dmdr_jax.models import placement
    from dmdr_jax.planning import hlo, topology
    from dmdr_jax.training import sharding

    mesh = sharding.make_mesh(2, 8, 1, topology.describe_devices(topology.parse("v5e:4x4")))
    convolve = partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def largest_whole(shape: tuple[int, ...]) -> int:
        spatial = (32, 32) if len(shape) == 4 else (1024,)
        function = convolve if len(shape) == 4 else jnp.matmul

        def gradient(kernel: jax.Array, x: jax.Array) -> jax.Array:
            def loss(kernel: jax.Array) -> jax.Array:
                return (placement.product(function, x, kernel, jnp.bfloat16).astype(jnp.float32) ** 2).mean()

            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return jax.grad(loss)(kernel)

        where = NamedSharding(mesh, placement.split_spec(shape, 8))
        rows = sharding.batch_sharding(mesh, 32)
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        x = jax.ShapeDtypeStruct((32, *spatial, shape[-2]), jnp.bfloat16, sharding=rows)
        traced = jax.jit(gradient, out_shardings=where).trace(kernel, x)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=OPTIONS)
        found = hlo.collectives(compiled.as_text())
        assert hlo.total(found, hlo.SCATTER) > 0
        return hlo.largest_whole(found, 8)

    shapes = [tuple(map(int, argument.split(","))) for argument in sys.argv[1:]]
    print(json.dumps([largest_whole(shape) for shape in shapes]))


if __name__ == "__main__":
    main()
