"""Work of programs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from dmdr_jax.diffusion.kernels import parse_kernel
from dmdr_jax.diffusion.process import Flow
from dmdr_jax.diffusion.sampler import run_prefix
from dmdr_jax.models.layers import Dense
from dmdr_jax.planning import hlo
from dmdr_jax.planning.work import count, measure

A, B = jnp.zeros((4, 6)), jnp.zeros((6, 10))


def test_products_and_convolutions():
    assert count(jax.make_jaxpr(lambda a, b: a @ b)(A, B)) == 2 * 4 * 6 * 10
    x, k = jnp.zeros((1, 5, 5, 3)), jnp.zeros((3, 3, 3, 7))
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count(jax.make_jaxpr(conv)(x, k)) == 2 * 25 * 7 * 27


def test_every_turn_of_a_loop_counts():
    def loop(a):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ jnp.ones((6, 6))), None), a, None, length=5)[0].sum()

    once = 2 * 4 * 6 * 6
    assert count(jax.make_jaxpr(loop)(A)) == 5 * once
    # Backward: of constant weights the gradient of the activations alone.
    assert count(jax.make_jaxpr(jax.grad(loop))(A)) == 10 * once


def test_a_loop_of_random_length_counts_as_often_as_it_turns_on_average():
    def network(z, t):
        return z @ jnp.ones((6, 6))

    def simulate(noise, steps, mean):
        grid = jnp.linspace(1, 0, 5)
        return run_prefix(network, Flow(), parse_kernel("ode"), noise, grid, jax.random.key(0), steps, mean)

    # Of other sizes each, for programs that differ in names alone are one to the cache of compiled ones.
    for rows, mean, turns in ((4, None, 1), (5, 1.5, 1.5), (6, 12, 12)):
        noise = jnp.zeros((rows, 1, 1, 6))
        traced = jax.jit(lambda steps: simulate(noise, steps, mean)).trace(3)
        assert count(traced.jaxpr) == turns * 2 * rows * 6 * 6
        assert max(hlo_times(traced.lower().compile().as_text()).values()) == turns


def hlo_times(text):
    return hlo._times(*hlo._computations(text))


def test_traffic_is_what_products_read_and_write():
    assert measure(jax.make_jaxpr(lambda a, b: a @ b)(A, B)).traffic == 4 * (24 + 60 + 40)


@pytest.mark.parametrize("fsdp, times", [(1, 0), (4, 2)])
def test_gathers_are_counted_by_what_the_program_asks_for(fsdp, times):
    """Of a layer with gradient: once forward, and once more where it is computed again."""
    layer = Dense(512)
    x = jnp.zeros((8, 512))
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    mesh = AbstractMesh((2, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(params):
        with jax.sharding.use_abstract_mesh(mesh):
            y = jax.checkpoint(lambda p: jnp.sin(layer.apply(p, x)))(params)
            return y.sum()

    work = measure(jax.make_jaxpr(jax.grad(loss))(params))
    assert work.gathered == times * 512 * 512 * 4
    assert work.flops == 3 * 2 * 8 * 512 * 512  # forward, again, and the kernel's gradient


def test_what_is_whole_everywhere_is_not_gathered():
    """A frozen kernel that every device has whole beside LoRA factors that are split, in a loop, forward and back."""
    layer = Dense(512)
    x = jnp.zeros((8, 512))
    kernels = {"kernel": jnp.zeros((3, 512, 512)), "bias": jnp.zeros((3, 512))}
    deltas = {"a": jnp.zeros((3, 512, 128)), "b": jnp.zeros((3, 128, 512))}
    mesh = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def loss(deltas, kernels):
        @jax.checkpoint
        def block(x, own):
            kernel, delta = own
            return jnp.sin(layer.apply({"params": kernel, "lora": {"kernel": delta}}, x)), None

        with jax.sharding.use_abstract_mesh(mesh):
            return jax.lax.scan(block, x, (kernels, deltas))[0].sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(deltas, kernels)
    leaves = jax.tree.leaves((deltas, kernels))
    factors = 2 * 3 * 2 * 512 * 128 * 4  # forward, and computed again
    base = 2 * 3 * 512 * 512 * 4
    assert measure(jaxpr).gathered == factors + base
    split = [leaf.shape[1:] in ((512, 128), (128, 512)) for leaf in leaves]
    assert measure(jaxpr, split).gathered == factors
    assert measure(jaxpr, [False] * len(leaves)).gathered == 0
