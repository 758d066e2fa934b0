"""The stage before a run: pairs against diffusers' own sampler, what is learnt from them, stopping and going on."""

import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from dmdr_jax.data.prompts import PromptStream
from dmdr_jax.diffusion.process import Flow, VariancePreserving
from dmdr_jax.diffusion.sampler import sample
from dmdr_jax.distill.regression import HUBER, LOSSES, regression_input, squared_error
from dmdr_jax.errors import UserError
from dmdr_jax.model import open_model
from dmdr_jax.training import disk, ode, setup
from dmdr_jax.training.checkpoints import load_trained
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import freeze, run_metadata, train
from dmdr_jax.training.metrics import read_metrics
from dmdr_jax.training.ode_pairs import PairStore
from dmdr_jax.training.step import generator_weights
from dmdr_jax.training.text import make_encoder
from tests import tiny_pipelines
from tests.training import tiny
from tests.training.conftest import leaves_equal
from tests.training.test_processes import Group


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

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(store.folder), "write_bytes", half)
        store.append(numbered(2, 3))
    again = PairStore(tmp_path, DOCUMENT, SHAPE)
    assert len(again) == 2
    again.append(numbered(2, 3))
    np.testing.assert_array_equal(again.latents(np.array([3, 1]))[:, 0, 0, 0], [3, 1])


def test_a_store_asks_for_a_remote_shard_once(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "STORE", str(tmp_path))  # so that this folder counts as one in an object store
    PairStore(tmp_path, DOCUMENT, SHAPE).append(numbered(0, 1))
    store = PairStore(tmp_path, DOCUMENT, SHAPE)
    (tmp_path / "latents_0000000.npy").unlink()
    np.testing.assert_array_equal(store.latents(np.array([1, 0]))[:, 0, 0, 0], [1, 0])


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


# --- the stage, for a flow transformer and a noise-predicting UNet; LoRAs are below ----------------------------------

CASES = {
    "sd3_no_t5": {"generator__kind": "full", "student__steps": 1, "ode__lr": 3e-3},
    "sdxl": {
        "generator__kind": "full",
        "student__steps": 1,
        "student__timesteps": (399,),
        "ode__lr": 3e-3,
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
    pairs = ode.Pairs(prompts, store, make_encoder(config, pipeline, plan.image_size, (), layout), layout)
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


@pytest.mark.parametrize("run", ["sd3_no_t5", pytest.param("sdxl", marks=pytest.mark.slow)], indirect=True)
def test_one_call_of_the_student_approaches_the_whole_ode(run):
    """On the pairs it was fitted to, drawn as it will be drawn, its average."""
    steps, left = (80, 0.15) if run.kind == "sd3_no_t5" else (20, 0.7)  # whose steps cost ten times as much
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
    for _ in range(steps):
        state, metrics = update(state, run.frozen.base)
        errors.append(metrics["ode/error"])
    np.testing.assert_allclose(errors[0], before, rtol=1e-4)  # for one step, what is trained is what is drawn
    after = distance(state.ema, run.frozen.base)
    assert after < left * before and errors[-1] < left * errors[0]


# --- in a run ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, prompts_file):
    """A run with the stage, never interrupted; its generator does not move after it."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    config = ode_config(teacher, prompts_file, optim__generator__lr=0.0, preview__images=2)
    return workdir, config, train(config, workdir)


def test_the_run_starts_from_what_the_stage_ends_with(finished):
    workdir, _, state = finished
    trees, meta = load_trained(workdir / "ode")
    assert meta["step"] == 4 and meta["model"]["ode_pairs"]["guidance"] == 3.0
    assert leaves_equal(state.generator, trees["ema"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), state.ema, trees["ema"])
    assert not leaves_equal(trees["ema"], trees["generator"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.fake)) and int(state.step) == 1
    assert any(np.any(delta["b"]) for delta in deltas(trees["ema"]))  # it has left the teacher, where b is 0
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
    """Told to stop while the pairs are drawn, killed in the regression, told to stop there, killed after the stage."""
    whole, config, _ = finished
    assert train(config, tmp_path, stop=lambda pair: pair == 4) is None
    assert [path.name for path in (tmp_path / "ode").glob("latents_*")] == ["latents_0000000.npy"]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ode, "report", interrupting(ode.report, 5))  # of step 4, after the checkpoint of step 2
        train(config, tmp_path)
    assert latest(tmp_path) == 2
    assert train(config, tmp_path, stop=lambda count: count == config.ode.pairs + 3) is None
    assert latest(tmp_path) == 3
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(setup, "latest_or_new", interrupting(setup.latest_or_new, 2))  # the run's own
        train(config, tmp_path)
    for name in SHARDS:
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


SHARDS = ("latents_0000000.npy", "latents_0000004.npy")


def latest(workdir):
    return load_trained(workdir / "ode", ("step",))[1]["step"]


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


@pytest.mark.slow
def test_two_processes_make_what_one_makes(teacher, prompts_file, tmp_path):
    """Pairs and student, up to the order in which sums are taken; pytest -m slow tests/training/test_ode.py."""
    stage = {"steps": 2, "pairs": 12, "batch": 8, "teacher_steps": 2, "lr": 1e-3}
    for count in (1, 2):
        program = [sys.executable, "-m", "dmdr_jax.train", f"--workdir={tmp_path / str(count)}"]
        program += [f"--config=tests/training/tiny_config.py:{teacher},{prompts_file}", "--config.batch=8"]
        program += ["--config.steps=1", *(f"--config.ode.{key}={value}" for key, value in stage.items())]
        Group(count, program, tmp_path).check()
    one, two = tmp_path / "1" / "ode", tmp_path / "2" / "ode"
    for name in ("latents_0000000.npy", "latents_0000008.npy"):
        np.testing.assert_allclose(np.load(two / name), np.load(one / name), rtol=1e-4, atol=1e-4)
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        np.testing.assert_allclose(b["ode/loss"], a["ode/loss"], rtol=1e-3)


@pytest.mark.slow
def test_a_split_network_makes_what_a_whole_one_makes(tmp_path):
    """The embedded world's network, large enough to be split over eight devices: the stage, a step, the pictures.

    pytest -m slow tests/training/test_ode.py: two minutes of one core.
    """
    changes = {"batch": 8, "steps": 1, "generator.kind": "full", "mesh.base": "split", "watch.every": 0}
    changes |= {"ode.steps": 2, "ode.pairs": 8, "ode.batch": 8, "ode.teacher_steps": 2}
    changes |= {"preview.images": 8, "preview.teacher_steps": 2}
    changes |= {"rewards.shapes_clip.weight": 0, "rewards.shapes_hps.weight": 0}
    runs = {devices: tmp_path / str(devices) for devices in (1, 8)}
    for devices, workdir in runs.items():
        program = [sys.executable, "-m", "dmdr_jax.train", "--config=configs/shapes/sd3.py", f"--workdir={workdir}"]
        program += [f"--config.{key}={value}" for key, value in {**changes, "mesh.fsdp": devices}.items()]
        group = Group(1, program, tmp_path, devices)
        group.check()
        assert f"(data 1, fsdp {devices}, tensor 1)" in group.text()
    for folder in ("ode", ""):
        rows, expected = (read_metrics(workdir / folder) for workdir in (runs[8], runs[1]))
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, nan_ok=True)
    for name in ("samples/ode.png", "samples/teacher.png", "samples/student_000001.png"):
        found, wanted = (np.asarray(Image.open(workdir / name), np.int16) for workdir in (runs[8], runs[1]))
        assert np.abs(found - wanted).max() <= 1
