"""The two steps of the benchmarks, in JAX and in plain PyTorch, are one step: equal losses and gradients."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from benchmarks import step, torch_reference
from benchmarks import workload as work
from dmdr_jax.diffusers_io import keymap
from dmdr_jax.diffusers_io.lora_file import delta_leaves
from dmdr_jax.diffusion.sampler import step_noise
from dmdr_jax.training.plan import keys_of
from dmdr_jax.training.rollouts import start_noise
from dmdr_jax.training.scoring import Scorer
from dmdr_jax.training.step import fake_step, generator_step

BATCH = 2


@pytest.fixture(scope="module", params=["tiny", pytest.param("tiny-sdxl", marks=pytest.mark.slow)])
def pair(request):
    """Both sides of one workload, with adapters that do something and no clipping."""
    workload, weight = work.Workload(request.param, BATCH), work.weight

    def calm(key, shape, seed=0):
        """A rollout of a network as steep as random weights make it magnifies rounding in each of its steps."""
        return weight(key, shape, seed) * np.float32(0.1 if key in ("conv_out.weight", "proj_out.weight") else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "weight", calm)
        bench = step.Bench.make(workload)
        theirs = torch_reference.Step(bench.run, workload, "cpu")
    moved = [_noisy(tree, i) for i, tree in enumerate((bench.state.generator, bench.state.fake))]
    bench.state = bench.state._replace(generator=moved[0], fake=moved[1], ema=jax.tree.map(jnp.copy, moved[0]))
    for net, name, delta in ((theirs.student, "generator", moved[0]), (theirs.score, "fake", moved[1])):
        _load(net, name, delta)
    theirs.clip = float("inf")
    return bench, theirs


def _noisy(delta, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), delta)


def _tensors(delta):
    """PEFT's parameter names and tensors of a delta."""
    found = {}
    for path, factors in delta_leaves(delta):
        for name, letters in (("a", "lora_A"), ("b", "lora_B")):
            for module, index in keymap.module_names(path[:-1]):
                x = np.asarray(factors[name])[index]
                found[f"{module}.{letters}"] = torch.tensor(x.transpose(keymap.TO_TORCH[x.ndim]).copy())
    return found


def _load(net, adapter, delta):
    parameters, tensors = dict(net.named_parameters()), _tensors(delta)
    names = {f"{key}.{adapter}.weight" for key in tensors}
    assert names == {name for name, p in parameters.items() if p.requires_grad}
    with torch.no_grad():
        for key, tensor in tensors.items():
            parameters[f"{key}.{adapter}.weight"].copy_(tensor)


def _draws(bench, part):
    """The random numbers that our update draws, for the other side."""
    plan, state = bench.run.plan, bench.state
    keys = keys_of(state)
    to_torch = lambda x: torch.tensor(np.moveaxis(np.asarray(x), -1, -3).copy())
    noise = start_noise(plan, keys("fake/noise" if part == "fake" else "generator/noise"), BATCH, 1)
    key_index, key_kernel, _ = jax.random.split(keys(f"{part}/simulation"), 3)
    steps = [step_noise(key_kernel, i, noise) for i in range(plan.simulation.steps)]
    where = "fake" if part == "fake" else "dm"
    scorer = Scorer.at(plan, bench.frozen, state.fake, state.step)
    return torch_reference.Draws(
        to_torch(noise),
        torch.stack([to_torch(x) for x in steps]),
        torch.tensor(np.asarray(plan.simulation.draw_index(key_index, BATCH)), dtype=torch.long),
        torch.tensor(np.asarray(scorer.tau(keys(f"{where}/tau"), BATCH))),
        to_torch(jax.random.normal(keys(f"{where}/renoise"), noise.shape, jnp.float32)),
        float(scorer.guidance(keys("dm/guidance"))),
    )


def _gradient(opt_state, b1=0.9):
    """What the optimiser was given at its first update: its first moment, undone."""
    return jax.tree.map(lambda m: m / (1 - b1), optax.tree_utils.tree_get(opt_state, "mu"))


def _compare(ours, net, adapter):
    parameters, wanted = dict(net.named_parameters()), _tensors(ours)
    got = {key: parameters[f"{key}.{adapter}.weight"].grad for key in wanted}
    size = sum(float((x**2).sum()) for x in wanted.values()) ** 0.5
    distance = sum(float(((got[key] - wanted[key]) ** 2).sum()) for key in wanted) ** 0.5
    assert size > 0
    assert distance < 1e-3 * size, (distance, size)


def _without_clip(bench):
    """The run's plan with gradients as they are."""
    config = bench.workload.config()
    tx = {
        name: optax.adamw(config.optim[name].lr, weight_decay=config.optim[name].weight_decay)
        for name in ("generator", "fake")
    }
    plan = dataclasses.replace(bench.run.plan, generator_tx=tx["generator"], fake_tx=tx["fake"])
    state = bench.state
    opts = {"generator_opt": tx["generator"].init(state.generator), "fake_opt": tx["fake"].init(state.fake)}
    return plan, state._replace(**opts)


def test_fake_updates_are_equal(pair):
    bench, theirs = pair
    plan, state = _without_clip(bench)
    after, metrics = jax.jit(functools.partial(fake_step, plan))(state, bench.frozen, bench.batch)
    loss = theirs.fake_update(_draws(bench, "fake"))
    assert float(metrics["fake/loss"]) == pytest.approx(float(loss), rel=1e-4)
    _compare(_gradient(after.fake_opt), theirs.score, "fake")
    _load(theirs.score, "fake", bench.state.fake)  # as the other test wants it


def test_generator_updates_are_equal(pair):
    bench, theirs = pair
    plan, state = _without_clip(bench)
    update = jax.jit(functools.partial(generator_step, plan, bench.terms))
    after, metrics = update(state, bench.frozen, bench.batch)
    loss, gradient = theirs.generator_update(_draws(bench, "generator"))
    norm = (gradient**2).sum((1, 2, 3)).sqrt().mean()
    assert float(metrics["dm/loss"]) == pytest.approx(float(loss), rel=1e-3)
    assert float(metrics["dm/gradient_norm"]) == pytest.approx(float(norm), rel=1e-3)
    _compare(_gradient(after.generator_opt), theirs.student, "generator")


def test_operations_grow_with_the_batch_and_not_with_recomputation():
    one, two = (step.operations(work.Workload(batch=b)) for b in (1, 2))
    again = step.operations(work.Workload(batch=2, remat="full"))
    assert again == two
    for name in ("fake", "generator"):
        assert two[name] == pytest.approx(2 * one[name], rel=0.02)
    assert one["generator"] > one["fake"] > 0


def test_help_needs_neither_jax_nor_torch():
    code = "import sys, benchmarks.{0}; assert not {{'jax', 'torch'}} & set(sys.modules); benchmarks.{0}.parser()"
    for name in ("step", "torch_reference"):
        subprocess.run([sys.executable, "-c", code.format(name)], check=True, cwd=Path(__file__).parents[1])


def test_numbers_are_written(tmp_path):
    found = work.summary([(3.0, 0.3), (1.0, 0.1), (2.0, 0.2)], 4)
    assert (found["seconds"], found["least"], found["most"]) == (2.0, 1.0, 3.0)
    assert (found["process_seconds"], found["images_per_second"]) == (0.2, 2.0)
    file = tmp_path / "numbers.json"
    work.write(file, {"outer": work.outer(found, {"seconds": 6.0, "process_seconds": 1.0}, 16)})
    assert json.loads(file.read_text())["outer"] == {"seconds": 16.0, "process_seconds": 2.0, "images_per_second": 1.0}


def test_only_repeats_count_and_each_waits_once():
    runs = []
    assert len(work.clocked(runs.append, 3, 5)) == 3
    assert runs == [1, 5, 5, 5]
