"""The programs as a user calls them: help in no time, drawing as diffusers draws, students that come back."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from dmdr_jax import cli, export, sample
from dmdr_jax.errors import UserError
from dmdr_jax.training import loop
from tests import tiny_pipelines
from tests.training import tiny

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "a blue square and a cross", "two crosses"]
SIZE = dict(height=16, width=24)


@pytest.mark.parametrize("program", ["train", "sample", "export", "evaluate", "report"])
def test_help_answers_in_under_a_second(program):
    command = [sys.executable, "-X", "importtime", "-m", f"dmdr_jax.{program}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"dmdr_jax.{program}" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"jax", "transformers", "torch", "orbax", "diffusers", "scipy"}  # the slow ones


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny_pipelines.save(tmp_path_factory.mktemp("pipe") / name, name) for name in ("sd3", "sdxl")}


@pytest.fixture(scope="module", params=["sd3", "sdxl"])
def folder(request, folders):
    return folders[request.param]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def latents_like(pipe, count=3, seed=0):
    factor, denoiser = pipe.vae_scale_factor, pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    shape = (count, denoiser.config.in_channels, SIZE["height"] // factor, SIZE["width"] // factor)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run_sample(out, model, prompts, latents, tmp_path, *more):
    np.save(tmp_path / "latents.npy", latents)
    argv = ["--model", model, "--prompts", prompts, "--latents", tmp_path / "latents.npy", "--out", out, *more]
    sample.main(sample.parser().parse_args([str(a) for a in [*argv, "--format", "npy"]]))
    return np.load(Path(out) / "images.npy")


@pytest.mark.parametrize("guidance, negative", [(5.0, None), (5.0, ""), (3.0, "a cross"), (1.0, None)])
def test_a_teacher_draws_the_pixels_that_diffusers_draws(folder, prompts_file, tmp_path, guidance, negative):
    compare_teacher(folder, prompts_file, tmp_path, guidance, negative)


def test_a_v_predicting_teacher_draws_the_pixels_that_diffusers_draws(prompts_file, tmp_path):
    folder = tiny_pipelines.save(tmp_path / "pipe", "sdxl_v")
    compare_teacher(folder, prompts_file, tmp_path, 4.0, None)


def compare_teacher(folder, prompts_file, tmp_path, guidance, negative):
    pipe = tiny_pipelines.load(folder)
    latents = latents_like(pipe)
    options = ["--steps", 4, "--guidance", guidance]
    options += [] if negative is None else ["--negative_prompt", negative, "--encode_once"]
    ours = run_sample(tmp_path / "out", folder, prompts_file, latents, tmp_path, *options)
    theirs = pipe(
        PROMPTS,
        negative_prompt=negative and [negative] * len(PROMPTS),
        latents=torch.from_numpy(latents),
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="np",
        **SIZE,
    ).images
    assert ours.dtype == np.float32 and ours.shape == theirs.shape == (3, 16, 24, 3)
    assert np.abs(ours - theirs).max() < 1e-3
    assert theirs.std() > 0.05


RUNS = ["sd3-lora-ode", "sd3-full-renoise", "sdxl-lora-ode", pytest.param("sdxl-full-renoise", marks=pytest.mark.slow)]


class RandomMoves:
    """Updates that move the generator at random, for what comes after a run: nothing has to be compiled for them."""

    def __init__(self, *_):
        pass

    def before_generator(self, step, fake_updates):
        return fake_updates

    def fake(self, step, state, frozen, batch):
        return state._replace(inner=state.inner + 1), {}

    def generator(self, step, state, frozen, batch):
        leaves, structure = jax.tree.flatten(state.generator)
        keys = jax.random.split(jax.random.key(step), len(leaves))
        moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
        generator = jax.tree.unflatten(structure, moved)
        return state._replace(step=state.step + 1, generator=generator, ema=generator), {}


@pytest.fixture(scope="module")
def moved_at_random():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Updates", RandomMoves)
        yield


@pytest.fixture(scope="module", params=RUNS)
def trained(request, folders, prompts_file, tmp_path_factory, moved_at_random):
    """Kind, kernel, teacher and workdir of a run."""
    family, kind, kernel = request.param.split("-")
    settings = dict(generator__kind=kind, student__simulation=kernel, steps=2, height=16, width=24)
    if kernel == "renoise":
        settings["t5_length"] = 12  # which the call that export prints must say
    if family == "sdxl":
        settings |= dict(student__shift=1.0, generator__lora__targets="wide")
    config = tiny.config(folders[family], prompts_file, **settings)
    run = tmp_path_factory.mktemp("runs") / kernel
    loop.train(config, run)
    return kind, kernel, folders[family], run


def diffusers_call(text):
    """The one call that the export printed, as a function of the pipeline."""
    line = next(line for line in text.splitlines() if line.startswith("image = pipe("))
    return line.removeprefix("image = ").removesuffix(".images[0]")


def draw_documented(pipe, text, latents, noises=None):
    """Draws by the documented call, with given latents and, for a stochastic scheduler, given noise."""
    call = diffusers_call(text).replace("pipe(prompt", "pipe(PROMPTS, latents=latents, output_type='np', **SIZE")
    scope, given = pipe.scheduler.step.__globals__, iter(noises or [])
    original = scope["randn_tensor"]
    scope["randn_tensor"] = lambda shape, **_: torch.from_numpy(next(given)).reshape(shape)
    try:
        return eval(call, {"pipe": pipe, "PROMPTS": PROMPTS, "latents": torch.from_numpy(latents), "SIZE": SIZE}).images
    finally:
        scope["randn_tensor"] = original


def our_noises(latents, steps=4):
    """The noise our sampler draws at each step with seed 0, as diffusers shapes it."""
    from dmdr_jax.diffusion.sampler import step_noise
    from dmdr_jax.generate import row_keys

    like = np.zeros((latents.shape[0], *latents.shape[2:], latents.shape[1]), np.float32)
    draws = [np.asarray(step_noise(row_keys(0, range(len(like))), i, like)) for i in range(steps)]
    return [np.ascontiguousarray(d.transpose(0, 3, 1, 2)) for d in draws]


def test_the_exported_folder_draws_exactly_our_student(trained, prompts_file, tmp_path, capsys):
    _, kernel, _, run = trained
    out = tmp_path / "student"
    args = ["--checkpoint", run, "--out", out, "--dtype", "float32"]
    export.main(export.parser().parse_args([str(a) for a in args]))
    text = capsys.readouterr().out
    pipe = tiny_pipelines.load(out)
    latents = latents_like(pipe)
    ours = run_sample(tmp_path / "ours", run, prompts_file, latents, tmp_path, "--encode_once")
    again = run_sample(tmp_path / "again", out, prompts_file, latents, tmp_path)
    theirs = draw_documented(pipe, text, latents, our_noises(latents) if kernel == "renoise" else None)
    if pipe.scheduler.config._class_name == "FlowMatchEulerDiscreteScheduler":
        assert np.allclose(pipe.scheduler.sigmas, [1.0, 0.9, 0.75, 0.5, 0.0], atol=1e-5)
    else:
        assert "timesteps=[999, 749, 499, 249]" in text
        assert type(pipe.scheduler).__name__ == {"renoise": "LCMScheduler", "ode": "EulerDiscreteScheduler"}[kernel]
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(again - theirs).max() < 1e-3
    teacher = run_sample(tmp_path / "teacher", pipe.config._name_or_path, prompts_file, latents, tmp_path)
    assert teacher.shape == ours.shape


def test_the_exported_lora_draws_exactly_our_student(trained, prompts_file, tmp_path, capsys):
    kind, _, folder, run = trained
    file = tmp_path / "made" / "student.safetensors"
    args = export.parser().parse_args(["--checkpoint", str(run), "--out", str(file), "--lora"])
    if kind == "full":
        with pytest.raises(UserError, match="without --lora"):
            export.main(args)
        return
    export.main(args)
    text = capsys.readouterr().out
    pipe = tiny_pipelines.load(folder)
    latents = latents_like(pipe)
    before = draw_documented(pipe, text, latents)
    scope = {"pipe": pipe}
    lines = ("pipe.load", "pipe.scheduler", "from diffusers")
    exec("\n".join(line for line in text.splitlines() if line.startswith(lines)), scope)
    theirs = draw_documented(pipe, text, latents)
    ours = run_sample(tmp_path / "ours", run, prompts_file, latents, tmp_path)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(before - theirs).max() > 1e-2  # the LoRA did something
    grid = {"sd3": "1000,900,750,500", "sdxl": "999,749,499,249"}[Path(folder).name]
    options = ["--lora", file, "--timesteps", grid, "--guidance", 1, "--kernel", "ode"]
    again = run_sample(tmp_path / "again", folder, prompts_file, latents, tmp_path, *options)
    assert np.abs(again - theirs).max() < 1e-3
    check_start(run, folder, prompts_file, file)


def check_start(run, folder, prompts_file, file):
    """A run that starts from the exported LoRA starts as the student that it is of."""
    from dmdr_jax.diffusion.denoiser import Denoiser
    from dmdr_jax.model import open_model
    from dmdr_jax.training import setup
    from dmdr_jax.training.layout import Layout
    from dmdr_jax.training.step import generator_weights

    config = tiny.config(folder, prompts_file, generator__lora__start=str(file), generator__lora__targets="wide")
    config.generator.lora.rank, config.generator.lora.alpha = 6, 3.0
    pipeline = setup.load_teacher(config, Layout.make(-1, 1))
    plan, base = setup.make_plan(config, pipeline, ()), pipeline.params[pipeline.denoiser]
    start = generator_weights(plan, setup.generator_from_file(config, pipeline, plan), base)
    model = open_model(str(run), use_ema=True)
    cond = make_cond(pipeline)
    z = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    denoiser = Denoiser(plan.denoiser.module, plan.denoiser.process)
    outputs = [jax.jit(denoiser.output)(w, z, 0.5, cond) for w in (start, model.weights)]
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-4 * np.abs(outputs[1]).max()


def make_cond(pipeline):
    from dmdr_jax.diffusers_io.text import encode, text_params, tokenize

    encoder = jax.jit(partial(encode, pipeline.modules, size=(16, 16)))
    return encoder(text_params(pipeline), tokenize(pipeline, PROMPTS[:2]))


def test_export_refuses_what_is_there_and_kernels_diffusers_lacks(trained, tmp_path):
    *_, run = trained
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(UserError, match="taken"):
        export.main(export.parser().parse_args(["--checkpoint", str(run), "--out", str(tmp_path / "taken")]))
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    for own in (run, run / "checkpoints", trained[2]):  # nor is anything but a pipeline replaced, or the teacher
        with pytest.raises(UserError, match="give another name"):
            export.main(export.parser().parse_args(["--checkpoint", str(run), "--out", str(own), "--overwrite"]))
    assert (run / "metrics.jsonl").exists() and (trained[2] / "model_index.json").exists()


def test_a_student_trained_without_t5_is_drawn_and_exported_without_it(tmp_path, prompts_file, capsys, moved_at_random):
    folder = tiny_pipelines.save(tmp_path / "pipe")
    config = tiny.config(folder, prompts_file, t5=False, steps=1)
    loop.train(config, tmp_path / "run")
    ours = run_sample(
        tmp_path / "ours", tmp_path / "run", prompts_file, latents_like(tiny_pipelines.load(folder)), tmp_path
    )
    export.main(export.parser().parse_args(["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "student")]))
    assert "text_encoder_3=None, tokenizer_3=None" in capsys.readouterr().out
    pipe = tiny_pipelines.load(tmp_path / "student")
    assert pipe.text_encoder_3 is None and not (tmp_path / "student" / "text_encoder_3").exists()
    again = run_sample(tmp_path / "again", tmp_path / "student", prompts_file, latents_like(pipe), tmp_path)
    assert np.abs(ours - again).max() < 1e-4
    teachers = [
        run_sample(tmp_path / name, folder, prompts_file, latents_like(pipe), tmp_path, "--steps", 2, *more)
        for name, more in (("with", []), ("without", ["--no_t5"]))
    ]
    assert np.abs(teachers[0] - teachers[1]).max() > 1e-3


def test_png_output_and_settings(folder, prompts_file, tmp_path):
    argv = f"--model {folder} --prompts {prompts_file} --out {tmp_path / 'o'} --steps 2 --height 16 --width 16"
    sample.main(sample.parser().parse_args([*argv.split(), "--batch", "2"]))
    assert sorted(p.name for p in (tmp_path / "o").glob("*.png")) == ["00000.png", "00001.png", "00002.png"]
    assert json.loads((tmp_path / "o" / "settings.json").read_text())["nfe"] == 4
    assert (tmp_path / "o" / "prompts.txt").read_text().splitlines() == PROMPTS


@pytest.mark.parametrize("kernel", ["renoise", pytest.param("ode", marks=pytest.mark.slow)])
def test_an_image_does_not_depend_on_its_batch(folder, prompts_file, tmp_path, kernel):
    for batch in (1, 3):
        argv = f"--model {folder} --prompts {prompts_file} --out {tmp_path / str(batch)} --steps 2 --height 16"
        argv += f" --width 16 --batch {batch} --kernel {kernel} --format npy"
        sample.main(sample.parser().parse_args(argv.split()))
    assert np.allclose(*(np.load(tmp_path / b / "images.npy") for b in "13"), atol=1e-4)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--height", "17"], "multiples of"),
        (["--steps", "0"], "at least 1"),
        (["--kernel", "heun"], "ode, renoise or cps"),
        (["--latents", "nowhere.npy"], "nowhere.npy"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--seed", "5000000000"], "--seed"),
        (["--guidance", "nan"], "--guidance"),
        (["--out", __file__], "cannot be a folder"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_named(folder, prompts_file, tmp_path, more, message):
    argv = ["--model", str(folder), "--prompts", str(prompts_file), "--out", str(tmp_path / "o"), *more]
    with pytest.raises(UserError, match=message):
        sample.main(sample.parser().parse_args(argv))


def test_latents_must_fit(folder, prompts_file, tmp_path):
    pipe = tiny_pipelines.load(folder)
    for latents, message in [
        (latents_like(pipe, 2), "one per prompt"),
        (latents_like(pipe)[:, :-1], "channels"),
        (latents_like(pipe)[0], r"\[b, c, h, w\]"),
        (latents_like(pipe).astype(int), "floats"),
    ]:
        with pytest.raises(UserError, match=message):
            run_sample(tmp_path / "o", folder, prompts_file, latents, tmp_path)


def test_errors_are_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda _: (_ for _ in ()).throw(UserError("no such\nthing")), argv=[])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"
