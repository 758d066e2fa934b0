"""The stage before a run: pairs against diffusers' own sampler, what is learnt from them, stopping and going on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from dmdr_jax.data.prompts import PromptStream
from dmdr_jax.diffusion.process import Flow, VariancePreserving
from dmdr_jax.diffusion.sampler import sample
from dmdr_jax.distill.regression import HUBER, LOSSES, regression_input, squared_error
from dmdr_jax.errors import UserError
from dmdr_jax.model import open_model
from dmdr_jax.training import ode, setup
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import freeze, make_encoder, run_metadata, train
from dmdr_jax.training.metrics import read_metrics
from dmdr_jax.training.ode_pairs import PairStore
from dmdr_jax.training.step import generator_weights
from tests import tiny_pipelines
from tests.training import tiny
from tests.training.conftest import leaves_equal

ROOT = Path(__file__).parents[2]


def ode_config(folder, prompts, **changes):
    """A run with a stage of a few steps: seven pairs in batches of four, the last one filled up."""
    stage = {"steps": 4, "pairs": 7, "batch": 4, "teacher_steps": 3, "lr": 3e-3, "ema": 0.5}
    changes = {f"ode__{key}": value for key, value in stage.items()} | {"steps": 1, "batch": 4} | changes
    return tiny.config(folder, prompts, guidance__scale=3.0, **changes)


# --- the mathematics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [Flow(), VariancePreserving()])
def test_inputs_are_the_noise_at_the_first_step_and_noised_latents_after(process):
    grid = (1.0, 0.75, 0.5, 0.0)
    noise, latents, fresh = (np.random.default_rng(i).normal(size=(512, 2, 2, 1)) for i in range(3))
    z, t = map(np.asarray, regression_input(process, grid, jnp.float32(noise), jnp.float32(latents), jax.random.key(0)))
    np.testing.assert_allclose(z[t == 1.0], noise[t == 1.0], rtol=1e-6)
    for time in grid[1:3]:
        alpha, sigma = (float(c) for c in process.coefficients(np.float32(time)))
        fresh = (z[t == time] - alpha * latents[t == time]) / sigma  # of the very data, or it would not be standard
        assert abs(fresh.mean()) < 0.1 and abs(fresh.std() - 1.0) < 0.1
        assert abs(np.corrcoef(fresh.ravel(), noise[t == time].ravel())[0, 1]) < 0.15
    counts = [(t == time).sum() for time in grid[:3]]
    assert sum(counts) == 512 and min(counts) > 120  # uniform


def test_losses_by_hand():
    x0, x = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4))
    error = squared_error(jnp.asarray(x0), jnp.asarray(x))
    norm = np.linalg.norm((x0 - x).reshape(3, -1), axis=1)
    np.testing.assert_allclose(error, norm**2 / 16, rtol=1e-5)
    np.testing.assert_allclose(LOSSES["mse"](error), norm**2 / 16, rtol=1e-5)
    c = HUBER * np.sqrt(16)  # as in the paper: of the norm, with a root of the dimension in c
    np.testing.assert_allclose(LOSSES["huber"](error), (np.sqrt(norm**2 + c**2) - c) / np.sqrt(16), rtol=1e-4)


# --- the store -----------------------------------------------------------------------------------------------------

DOCUMENT = {"seed": 1, "grid": [1.0, 0.0]}
SHAPE = (2, 2, 1)


def numbered(*pairs):
    return np.stack([np.full(SHAPE, pair, np.float32) for pair in pairs])


def test_a_store_finds_pairs_of_any_shards_and_goes_on_where_it_ends(tmp_path):
    store = PairStore(tmp_path, DOCUMENT, SHAPE)
    store.append(numbered(0, 1, 2))
    store.append(numbered(3))
    again = PairStore(tmp_path, DOCUMENT, SHAPE)
    assert len(again) == 4
    again.append(numbered(4, 5))
    order = np.array([5, 0, 3, 2, 4, 0, 1])
    np.testing.assert_array_equal(again.latents(order)[:, 0, 0, 0], order)


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch):
    store = PairStore(tmp_path, DOCUMENT, SHAPE)
    store.append(numbered(0, 1))

    def half(file, array):
        file.write(b"\x93NUMPY")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", half)
        store.append(numbered(2, 3))
    again = PairStore(tmp_path, DOCUMENT, SHAPE)
    assert len(again) == 2
    again.append(numbered(2, 3))
    np.testing.assert_array_equal(again.latents(np.array([3, 1]))[:, 0, 0, 0], [3, 1])


def test_what_is_wrong_with_a_store_is_said(tmp_path):
    store = PairStore(tmp_path, DOCUMENT, SHAPE)
    store.append(numbered(0, 1))
    with pytest.raises(UserError, match="seed is 1 there and 2 here; delete that folder"):
        PairStore(tmp_path, {**DOCUMENT, "seed": 2}, SHAPE)
    with pytest.raises(UserError, match=r"pairs 2 to 2 are not finite"):
        store.append(numbered(np.nan))
    shard = tmp_path / "latents_0000000.npy"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"latents_0000000\.npy is damaged"):
        PairStore(tmp_path, DOCUMENT, SHAPE)


# --- the stage, for a flow transformer in full and a noise-predicting UNet by LoRA ----------------------------------

CASES = {
    "sd3_no_t5": {"generator__kind": "full", "student__steps": 1},
    "sdxl": {
        "generator__kind": "lora",
        "generator__lora__targets": "wide",
        "student__steps": 1,
        "student__timesteps": (399,),
    },
}


@pytest.fixture(scope="module", params=CASES)
def run(request, tmp_path_factory, prompts_file):
    """The pieces of a run, and its pairs drawn."""
    kind, workdir = request.param, tmp_path_factory.mktemp("ode")
    folder = tiny_pipelines.save(workdir / "teacher", kind)
    config = ode_config(folder, prompts_file, **CASES[kind])
    layout = Layout.make(-1, 1)
    pipeline = setup.load_teacher(config, layout)
    plan = setup.make_plan(config, pipeline, ())
    frozen = freeze(config, pipeline, plan, (), layout)
    stage = ode.Stage.make(config, pipeline, plan)
    meta = run_metadata(config, pipeline, plan)
    store = PairStore(
        workdir / "ode", ode.describe_pairs(config, pipeline, stage, tiny.PROMPTS, meta), plan.latent_shape
    )
    prompts = PromptStream(tiny.PROMPTS, config.ode.pairs, config.seed).batch(0)
    pairs = ode.Pairs(prompts, store, make_encoder(config, pipeline, plan, (), layout), layout)
    ode.draw_pairs(stage, pairs, frozen, config.ode.batch)
    return SimpleNamespace(**locals())


def test_pairs_are_what_diffusers_draws_of_the_same_noise(run):
    assert [len(np.load(path)) for path in sorted(run.store.folder.glob("latents_*.npy"))] == [4, 3]
    indices = np.arange(7)
    noise = np.asarray(ode.pair_noise(run.stage, jnp.asarray(indices)))
    pipe = tiny_pipelines.load(run.folder)
    with torch.no_grad():
        expected = pipe(
            run.prompts,
            num_inference_steps=run.config.ode.teacher_steps,
            guidance_scale=run.config.guidance.scale,
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
            output_type="latent",
        ).images
    got = run.store.latents(indices)
    expected = expected.numpy().transpose(0, 2, 3, 1)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_call_of_the_student_approaches_the_whole_ode(run):
    """On the pairs it was fitted to, drawn as it will be drawn; and its average does."""
    state = jax.jit(lambda base: ode.first_state(run.config, run.pipeline.family, run.stage, base))(run.frozen.base)
    batch = run.pairs.batch(np.arange(4))
    update = jax.jit(lambda state, base: ode.ode_step(run.stage, state, base, batch))
    noise, grid = ode.pair_noise(run.stage, batch.pair), run.plan.simulation.grid

    @jax.jit
    def distance(generator, base):
        weights, denoiser = generator_weights(run.plan, generator, base), run.plan.denoiser
        drawn = sample(
            lambda z, t: denoiser.output(weights, z, t, batch.cond),
            denoiser.process,
            run.plan.simulation.kernel,
            noise,
            grid,
            jax.random.key(0),
        )
        return jnp.mean((drawn - batch.latents) ** 2)

    before = distance(state.ema, run.frozen.base)
    errors = []
    for _ in range(150):
        state, metrics = update(state, run.frozen.base)
        errors.append(metrics["ode/error"])
    np.testing.assert_allclose(errors[0], before, rtol=1e-4)  # for one step, what is trained is what is drawn
    after = distance(state.ema, run.frozen.base)
    assert after < 0.1 * before and errors[-1] < 0.1 * errors[0]


# --- in a run ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, prompts_file):
    """A run with the stage, never interrupted; its generator does not move after it."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = ode_config(teacher, prompts_file, optim__generator__lr=0.0)
    return workdir, config, train(config, workdir)


def test_the_run_starts_from_what_the_stage_ends_with(finished):
    workdir, _, state = finished
    trees, meta = load_trained(workdir / "ode")
    assert meta["step"] == 4 and meta["model"]["ode_pairs"]["guidance"] == 3.0
    assert leaves_equal(state.generator, trees["ema"]) and leaves_equal(state.ema, trees["ema"])
    assert not leaves_equal(trees["ema"], trees["generator"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.fake)) and int(state.step) == 1
    assert all(np.any(delta["b"]) for delta in deltas(trees["ema"]))  # every LoRA has left the teacher
    drawable = open_model(str(workdir / "ode"))
    assert leaves_equal(drawable.weights.lora, trees["ema"]) and list(drawable.recipe().grid) == meta["student"]["grid"]
    rows = read_metrics(workdir / "ode")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all({"ode/loss", "ode/error", "ode/gradient_norm"} <= row.keys() for row in rows)
    assert not any(name.startswith("ode/") for row in read_metrics(workdir) for name in row)
    assert (workdir / "samples" / "ode.png").exists()


def deltas(tree):
    if set(tree) == {"a", "b"}:
        return [tree]
    return [delta for child in tree.values() for delta in deltas(child)]


def test_stopping_and_going_on_changes_nothing(finished, tmp_path, monkeypatch):
    """Once while the pairs are drawn, once in the regression, and once between the stage and the run."""
    whole, config, _ = finished
    stops = [
        (PairStore, "append", interrupting(PairStore.append, 2)),
        (ode, "report", interrupting(ode.report, 5)),  # of step 4, after the checkpoint of step 2
        (setup, "latest_or_new", interrupting(setup.latest_or_new, 2)),  # the run's own, after the stage's
    ]
    for module, name, stopping in stops:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module, name, stopping)
            train(config, tmp_path)
        if name == "append":
            assert [path.name for path in (tmp_path / "ode").glob("latents_*")] == ["latents_0000000.npy"]
    for name in ("latents_0000000.npy", "latents_0000004.npy"):
        assert (tmp_path / "ode" / name).read_bytes() == (whole / "ode" / name).read_bytes()
    assert read_metrics(tmp_path / "ode") == read_metrics(whole / "ode")
    fields = ("step", "generator", "generator_opt", "ema")
    assert leaves_equal(load_trained(tmp_path / "ode", fields)[0], load_trained(whole / "ode", fields)[0])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):  # all is there: nothing is done again
        patch.setattr(ode, "draw_pairs", None)
        patch.setattr(PairStore, "latents", None)
        patch.setattr(setup, "latest_or_new", interrupting(setup.latest_or_new, 2))
        train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def interrupting(function, calls):
    """``function`` that is interrupted at the given call, counted from 1."""
    count = iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(count) == calls:
            raise Interrupted
        return function(*args, **kwargs)

    return wrapped


def test_a_run_with_a_checkpoint_of_its_own_does_without_the_stage(finished, tmp_path):
    whole, config, state = finished
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ode")
    assert leaves_equal(train(config, tmp_path / "run"), state)
    assert not (tmp_path / "run" / "ode").exists()


def test_pairs_of_another_setting_are_refused(finished, tmp_path):
    whole, config, _ = finished
    shutil.copytree(whole / "ode", tmp_path / "ode")
    with config.copy_and_resolve_references().unlocked() as other:
        other.ode.guidance = 5.0
    with pytest.raises(UserError, match=r"guidance is 3\.0 there and 5\.0 here"):
        train(other, tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ode__pairs": 2}, "config.ode.pairs is 2, fewer than one batch: take at least config.ode.batch, 4"),
        ({"ode__batch": 0}, "config.ode.batch must be at least 1"),
        ({"ode__teacher_steps": 0}, "config.ode.teacher_steps must be at least 1"),
        ({"ode__steps": -1}, "config.ode.steps must not be negative"),
        ({"ode__loss": "lpips"}, "config.ode.loss is 'lpips'; choose one of: mse, huber"),
        ({"ode__ema": 1.0}, "config.ode.ema"),
    ],
)
def test_settings_without_meaning_are_named(changes, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        setup.check(ode_config("nowhere", "nowhere", **changes))


def test_two_devices_make_what_one_makes(finished, teacher, prompts_file, tmp_path):
    """Noise, pairs and the student, up to the order in which sums are taken."""
    script = (
        "import sys, jax; assert jax.device_count() == 2; from tests.training import test_ode as t;"
        "t.setup.latest_or_new = t.interrupting(t.setup.latest_or_new, 2);"  # the stage is enough
        "t.train(t.ode_config(*sys.argv[1:3]), sys.argv[3])"
    )
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(teacher), str(prompts_file), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert "Interrupted" in done.stderr.splitlines()[-1], done.stderr
    folders = finished[0] / "ode", tmp_path / "ode"
    for name in ("latents_0000000.npy", "latents_0000004.npy"):
        one, two = (np.load(folder / name) for folder in folders)
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    one, two = (read_metrics(folder) for folder in folders)
    for name in ("ode/loss", "ode/gradient_norm"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=1e-3)
