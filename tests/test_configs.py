"""Every configuration builds its train steps at full size, with nothing allocated."""

from pathlib import Path

import jax
import numpy as np
import pytest

from dmdr_jax import cli, lora
from dmdr_jax.errors import UserError
from dmdr_jax.methods import METHODS
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.registry import open_spec
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.training.abstract import AbstractRun, abstract_reward

ROOT = Path(__file__).parents[1]
STAGES = ("cold", "joint")
FULL_SIZE = [
    "configs/sd3_medium.py",
    "configs/sd35_medium.py",
    "configs/sd35_large.py",
    "configs/sdxl.py",
    "configs/sdxl_1step.py",
    *(f"configs/paper/{name}.py:{stage}" for name in ("sd3_medium", "sd35_large", "sdxl_1step") for stage in STAGES),
]
SHAPES = ["configs/shapes/sd3.py", "configs/shapes/sdxl.py", "configs/shapes/sdxl_1step.py"]
PLANNED = ("dmd2", "gdmd", "drpo")  # methods whose state or data no other method has
DENOISERS = {
    "sd3_medium": 2_028_328_000,
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "sdxl": 2_567_463_684,
}
# Position tables are parameters of the file but are not trained.
TABLES = {"sd3_medium": 192**2 * 1536, "sd35_medium": 384**2 * 1536, "sd35_large": 192**2 * 2432, "sdxl": 0}


def model_of(spec):
    name = Path(spec.partition(":")[0]).stem
    return name.removesuffix("_1step")


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_no_configuration_is_forgotten():
    folders = ("configs", "configs/paper", "configs/shapes")
    files = {str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).glob("*.py")}
    runs = {f for f in files if Path(f).stem not in ("__init__", "base", "common") and "pretrain" not in f}
    assert runs == {spec.partition(":")[0] for spec in FULL_SIZE + SHAPES}


def _heavy(spec: str) -> bool:
    """SDXL's U-Net takes half a minute to trace; one configuration stands for the others of its size."""
    return "sdxl_1step" in spec


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=[pytest.mark.slow] * _heavy(spec)) for spec in FULL_SIZE + SHAPES]
)
def test_the_train_step_of_every_configuration_builds(spec):
    config = cli.load_config(spec)
    with config.unlocked():
        for reward in config.rewards.values():
            reward.weight = reward.weight or 0.3  # the files leave them to the user
    run = AbstractRun.of(config)
    if spec in FULL_SIZE:
        name = model_of(spec)
        assert size(run.frozen.base) == DENOISERS[name] + TABLES[name]
        is_lora = run.plan.generator_lora_scale is not None
        assert size(run.state.generator) == (lora.count(run.state.generator) if is_lora else DENOISERS[name])
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((run.state.generator, run.state.ema)))
        assert run.batch.cond.prompt_embeds.dtype == jax.numpy.bfloat16
    for after in run.trace():
        assert shapes(after) == shapes(run.state)


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] * (m not in PLANNED)) for m in METHODS])
def test_every_method_is_planned_over_shapes_alone(method):
    """What `plan` and the cost of an experiment are counted on; a discriminator's images are counted, not read."""
    own = {"dmd2": ["gan.images=shapes:small:train"], "drpo": ["student.steps=1"]}.get(method, [])
    run = AbstractRun.of(cli.load_config("configs/shapes/sd3.py", [f"method={method}", *own]))
    for after in run.trace():
        assert shapes(after) == shapes(run.state)
    if method == "dmd2":
        assert run.frozen.real.latents.shape == (1024, *run.plan.latent_shape) and run.frozen.real.cond.batch == 1024


@pytest.mark.parametrize(
    "stage, batch, steps, rates, rewards",
    [("cold", 192, 2000, (1e-6, 5e-7), set()), ("joint", 96, 4000, (5e-7, 2e-7), {"clip", "hps"})],
)
def test_the_authors_sd3_medium_in_numbers(stage, batch, steps, rates, rewards):
    c = cli.load_config(f"configs/paper/sd3_medium.py:{stage}")
    assert (c.batch, c.steps, (c.optim.generator.lr, c.optim.fake.lr)) == (batch, steps, rates)
    assert set(c.rewards) == rewards and all(r.weight == 0.3 and r.start == 2000 for r in c.rewards.values())
    assert (c.height, c.student.shift, c.student.simulation, c.student.grid) == (512, 3.0, "ode_final", "authors")
    assert (c.generator.lora.rank, c.generator.lora.alpha, c.fake.lora.rank, c.fake.scale) == (64, 128.0, 32, 2.0)


def test_an_unknown_stage_is_named():
    with pytest.raises(UserError, match="unknown stage 'warm'"):
        cli.load_config("configs/paper/sd3_medium.py:warm")


def test_a_reward_counts_as_what_lies_at_its_path(tmp_path):
    """The CLIP that is there; else, and for what is no CLIP, a ViT-H/14."""
    there = RewardSpec("shapes_clip", resolve("shapes:rewards/shapes_clip"), kind="clip")
    found, loaded = abstract_reward(there, jax.numpy.float32, False), open_spec(there)
    assert shapes(found.params) == shapes(loaded.params) and found.preprocess == loaded.preprocess
    for absent in (RewardSpec("clip", str(tmp_path / "none")), RewardSpec("clip", "")):
        assert abstract_reward(absent, jax.numpy.bfloat16, False).vision.config.hidden_size == 1280
