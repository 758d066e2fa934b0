"""Each method compiles what it needs and no more: FLOPs of its program against the hand count of `dmdr_jax.methods`.

Loops are written out for the count, since XLA counts the body of a loop once.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from dmdr_jax import methods
from dmdr_jax.diffusion.denoiser import Weights
from dmdr_jax.models.conditioning import Conditioning
from dmdr_jax.models.mmdit import MMDiT, MMDiTConfig
from dmdr_jax.training import scoring
from dmdr_jax.training.plan import RealImages
from dmdr_jax.training.step import generator_step, generator_weights
from tests.training import toy_run

LATENT = (8, 8, 4)
WIDTH = 64
NETWORK = MMDiTConfig.from_diffusers(
    {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 4,
    }
)
BATCH = 4
CASES = {name: {} for name in methods.METHODS} | {
    "dmd2": {"gan__images": "some"},
    "rtdmd": {"policy__steps": 1, "group__size": 2},
    "gdmd": {"fake__updates": 2},
    "gndm": {"gndm__draws": 2},
    "gndmr": {"gndm__draws": 2, "group__size": 2},
}
for grouped in ("dmdr_grpo", "dmdr_dpo", "ddmd_adv", "drpo", "dpo_only", "grpo_only"):
    CASES[grouped] = {"group__size": 2}


def cond(b):
    return Conditioning(jnp.zeros((b, 8, 32)), jnp.zeros((b, 16)))


@pytest.fixture(autouse=True, scope="module")
def written_out():
    """Loops as straight programs."""
    scan = jax.lax.scan
    jax.lax.scan = functools.partial(scan, unroll=True)
    yield
    jax.lax.scan = scan


def flops(function, *arguments):
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def run(method, **changes):
    real = RealImages(jnp.zeros((3, *LATENT)), cond(3)) if method == "dmd2" else None
    return toy_run.make(
        method, real=real, module=MMDiT(NETWORK), cond=cond, latent=LATENT, student__steps=2, batch=BATCH, **changes
    )


@functools.cache
def units():
    """FLOPs per row of each kind of pass."""
    r = run("dmdr_refl")
    z, t, denoiser = jnp.zeros((BATCH, *LATENT)), jnp.full(BATCH, 0.5), r.plan.denoiser

    def student(g, z):
        return denoiser.x0(generator_weights(r.plan, g, r.frozen.base), z, t, r.batch.cond)

    def fake(f, z):
        return denoiser.x0(Weights(r.frozen.base, f, 1.0), z, t, r.batch.cond)

    def reward(z):
        return sum(s.sum() for s in scoring.score_images(r.plan, r.frozen, z, r.batch)[1].values())

    total = lambda f: lambda *a: (f(*a) ** 2).sum()
    counted = {
        "student": flops(student, r.state.generator, z),
        "student_update": flops(jax.grad(total(student)), r.state.generator, z),
        "score": flops(fake, r.state.fake, z),
        "score_gradient": flops(jax.grad(total(fake), argnums=1), r.state.fake, z),
        "fake_update": flops(jax.grad(total(fake)), r.state.fake, z),
        "reward": flops(reward, z),
        "reward_gradient": flops(jax.grad(reward), z),
    }
    return {name: count / BATCH for name, count in counted.items()}


def sizes_of(method, changes):
    return methods.Sizes(
        K=2,
        G=changes.get("group__size", 1),
        M=1,
        U=changes.get("fake__updates" if method == "gdmd" else "rollout__updates", 1),
        S=changes.get("gndm__draws", 1),
        E={"gdmd": 2, "rtdmd": 1}.get(method, 0),
        W=int(method in ("dmd2", "drpo")),
    )


def check(method, passes, changes, step):
    """The program of generator step ``step`` has these passes."""
    r = run(method, **changes)
    expected = BATCH * sum(count * units()[name] for name, count in vars(passes).items())
    state = r.state._replace(step=jnp.int32(step))
    found = flops(functools.partial(generator_step, r.plan, r.active(step)), state, r.frozen, r.batch)
    assert found == pytest.approx(expected, rel=0.1), (found / units()["student"] / BATCH, passes)


@pytest.mark.parametrize("method", CASES)
def test_the_program_has_the_passes_of_the_hand_count(method):
    changes = CASES[method]
    check(method, methods.METHODS[method].passes(sizes_of(method, changes)), changes, toy_run.START)


@pytest.mark.parametrize("method", [name for name, method in methods.METHODS.items() if method.rewards != "none"])
def test_a_cold_start_has_the_passes_of_the_hand_count(method):
    """Before the first reward starts nothing of it is compiled: no decoding, no group, no policy step."""
    changes = CASES[method]
    check(method, methods.METHODS[method].cold_passes(sizes_of(method, changes)), changes, 0)


REUSING = ("dmdr_grpo", "dmdr_dpo", "gndm", "gndmr", "rtdmd", "dpo_only", "grpo_only")


@pytest.mark.parametrize("method", REUSING)
def test_several_updates_on_a_rollout_have_the_passes_of_the_hand_count(method):
    """The rollout, its rewards and the fake updates on it are there once, whatever the updates."""
    changes = CASES[method] | {"rollout__updates": 3}
    check(method, methods.METHODS[method].passes(sizes_of(method, changes)), changes, toy_run.START)
