"""Features are caught on the way, and the network's output stays what it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmdr_jax.diffusion.denoiser import Denoiser, Weights
from dmdr_jax.diffusion.process import VariancePreserving
from dmdr_jax.distill.features import feature_layers, feature_width, pooled, with_features
from dmdr_jax.distill.gan import discriminator_loss, generator_loss, init_head, logits
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.unet import UNet2DCondition
from dmdr_jax.models.unet_config import UNetConfig
from tests.distill import toy
from tests.models.test_unet import SHAPE


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_transformers_last_tokens(remat):
    denoiser, base, delta = toy.networks()
    denoiser = dataclasses.replace(denoiser, module=denoiser.module.clone(remat=remat))
    z, t, weights = jax.random.normal(jax.random.key(0), (3, *toy.LATENT)), jnp.full(3, 0.3), Weights(base, delta, 2.0)
    layers = feature_layers(denoiser.module)
    out, features = jax.jit(lambda z: with_features(denoiser, weights, z, t, toy.cond(3, 1), layers))(z)
    expected = np.asarray(denoiser.output(weights, z, t, toy.cond(3, 1)))
    assert np.abs(out - expected).max() < 5e-5 * np.abs(expected).max()  # two programs round differently
    assert {name: x.shape for name, x in features.items()} == {"norm_out": (3, 4, feature_width(denoiser.module))}


UNET = UNetConfig.from_diffusers(SHAPE | {"out_channels": 3})


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_a_unets_narrowest_layers(remat):
    denoiser = Denoiser(UNet2DCondition(UNET, remat=remat), VariancePreserving())
    keys = jax.random.split(jax.random.key(2), 3)
    cond = Conditioning(
        jax.random.normal(keys[0], (2, 3, 10)), jax.random.normal(keys[1], (2, 7)), time_ids=jnp.full((2, 6), 16.0)
    )
    z, t = jax.random.normal(keys[2], (2, 8, 8, 3)), jnp.full(2, 0.5)
    layers = feature_layers(denoiser.module, wide=True)

    @jax.jit
    def both(key):
        variables = denoiser.module.init(key, z, t, cond.prompt_embeds, cond.pooled, cond.time_ids)
        weights = Weights(toy.noisy(variables["params"], key))
        return with_features(denoiser, weights, z, t, cond, layers), denoiser.output(weights, z, t, cond)

    (out, features), expected = both(jax.random.key(0))
    assert np.allclose(out, expected, atol=1e-5)
    width = feature_width(denoiser.module)
    assert {name: x.shape for name, x in features.items()} == dict.fromkeys(layers, (2, 4, 4, width))
    assert feature_layers(denoiser.module) == ("mid_block.resnets.1",) and len(layers) == 3


def test_pooling_is_a_mean_over_cells():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    flat = pooled({"f": x}, 32, 32, 4)["f"]
    assert np.allclose(flat, np.asarray(x).reshape(2, 4, 2, 4, 2, 3).mean((2, 4)).reshape(2, -1), atol=1e-6)
    tokens = x.reshape(2, 64, 3)
    assert np.allclose(pooled({"f": tokens}, 16, 16, 4)["f"], flat, atol=1e-6)
    assert pooled({"f": jnp.zeros((1, 6, 4, 3))}, 6, 4, 4)["f"].shape == (1, 3 * 4 * 3)


def test_the_head_says_nothing_at_first_and_its_losses_are_the_logistic_ones():
    features = {
        "a": jax.random.normal(jax.random.key(2), (3, 5, 7)),
        "b": jax.random.normal(jax.random.key(3), (3, 2, 2, 4)),
    }
    head = init_head(jax.random.key(4), {"a": 7, "b": 4}, 16)
    assert not np.any(logits(head, features)) and logits(head, features).shape == (3,)
    assert float(discriminator_loss(jnp.zeros(3), jnp.zeros(3))) == pytest.approx(2 * np.log(2))
    assert float(generator_loss(jnp.zeros(3))) == pytest.approx(np.log(2))
    d = jnp.array([0.5, -1.0])
    sigmoid = 1 / (1 + np.exp(-np.asarray(d)))
    assert np.allclose(jax.grad(lambda x: discriminator_loss(x, -x))(d), sigmoid, atol=1e-6)
