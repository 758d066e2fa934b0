"""What only SDXL has in a run: one step at k = 399, its absent prompt, a tiny decoder, LoRA on convolutions."""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from configs import base as base_config
from dmdr_jax import export
from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError
from dmdr_jax.lora import LoraConfig, init
from dmdr_jax.model import open_model
from dmdr_jax.training import setup
from dmdr_jax.training.layout import Layout
from dmdr_jax.training.loop import freeze, train
from tests import tiny_pipelines
from tests.test_programs import PROMPTS, draw_documented, latents_like, run_sample
from tests.torch_weights import randomise
from tests.training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipelines.save(tmp_path_factory.mktemp("pipe") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """A random TAESD of the tiny pipeline's latents: 4 channels at half the image's size."""
    widths, blocks = (8, 8), (1, 1)
    codec = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    folder = tmp_path_factory.mktemp("taesd")
    randomise(codec).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def one_step_run(folder, prompts_file, tiny_decoder, reward_folder, tmp_path_factory):
    """A 1-step student after two updates, its rewards seen through the tiny decoder."""
    settings = dict(student__steps=1, student__timesteps=(399,), student__shift=1.0, generator__lora__targets="wide")
    settings |= dict(steps=2, height=16, width=24, optim__generator__lr=3e-2, ema=0.0, reward_decoder=str(tiny_decoder))
    config = tiny.config(folder, prompts_file, **settings)
    with config.unlocked():
        config.rewards.clip = base_config.reward(str(reward_folder), weight=0.5)
    workdir = tmp_path_factory.mktemp("runs") / "one_step"
    train(config, workdir)
    return workdir


def test_a_one_step_student_draws_in_diffusers_with_lcm_at_399(one_step_run, prompts_file, tmp_path, capsys):
    out = tmp_path / "student"
    export.main(
        export.parser().parse_args(["--checkpoint", str(one_step_run), "--out", str(out), "--dtype", "float32"])
    )
    text = capsys.readouterr().out
    assert "timesteps=[399]" in text
    pipe = tiny_pipelines.load(out)
    assert type(pipe.scheduler).__name__ == "LCMScheduler"
    latents = latents_like(pipe)
    theirs = draw_documented(pipe, text, latents)
    for model in (one_step_run, out):
        ours = run_sample(tmp_path / model.name, model, prompts_file, latents, tmp_path)
        assert np.abs(ours - theirs).max() < 1e-3
    assert open_model(str(one_step_run)).recipe().grid == pytest.approx((0.4, 0.0))


def test_the_student_is_told_399_and_given_pure_noise(folder, prompts_file):
    config = tiny.config(folder, prompts_file, student__steps=1, student__timesteps=(399,))
    pipeline = setup.load_teacher(config, Layout.make(-1, 1))
    plan, calls = setup.make_plan(config, pipeline, ()), []
    noise = jax.random.normal(jax.random.key(0), (2, *plan.latent_shape))

    def output_fn(z, t):
        calls.append((z, t))
        return z

    given = plan.simulation.student_input(output_fn, plan.denoiser.process, noise, jax.random.key(1))
    assert np.array_equal(given.z, noise)
    assert np.allclose(plan.denoiser.process.model_time(given.t), 399)


@pytest.mark.parametrize("uncond, zeros", [("pipeline", True), ("zeros", True), ("empty", False)])
def test_what_guidance_leads_away_from(folder, prompts_file, uncond, zeros):
    config = tiny.config(folder, prompts_file, guidance__uncond=uncond, height=16, width=24)
    layout = Layout.make(-1, 1)
    pipeline = setup.load_teacher(config, layout)
    frozen = freeze(config, pipeline, setup.make_plan(config, pipeline, ()), (), layout)
    assert bool(np.any(frozen.uncond.prompt_embeds)) is not zeros
    assert frozen.uncond.time_ids.tolist() == [[16, 24, 0, 0, 16, 24]]


def test_a_decoder_of_other_latents_is_refused(folder, prompts_file, tmp_path):
    AutoencoderTiny(latent_channels=4).save_pretrained(tmp_path / "taesd")
    config = tiny.config(folder, prompts_file, reward_decoder=str(tmp_path / "taesd"))
    with pytest.raises(UserError, match=r"decodes 4 channels at 1/8 .* have 4 at 1/2"):
        setup.load_teacher(config, Layout.make(-1, 1))
    with pytest.raises(UserError, match="no folder nowhere"):
        setup.load_teacher(tiny.config(folder, prompts_file, reward_decoder="nowhere"), Layout.make(-1, 1))


@pytest.mark.parametrize(
    "timesteps, message",
    [
        ((399, 200), "2 entries for config.student.steps=1"),
        ((1000,), "descending, from 999 down"),
        ((-1,), "descending, from 999 down"),
        ((200, 399), "2 entries"),
    ],
)
def test_timesteps_that_the_network_does_not_know_are_refused(folder, prompts_file, timesteps, message):
    config = tiny.config(folder, prompts_file, student__steps=1, student__timesteps=timesteps)
    pipeline = setup.load_teacher(config, Layout.make(-1, 1))
    with pytest.raises(UserError, match=message):
        setup.make_plan(config, pipeline, ())


def test_wide_targets_are_those_of_dmd2(folder):
    """Every module that DMD2's list of names matches in diffusers' network, and no other."""
    names = ("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
    names += ("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    unet = tiny_pipelines.build("sdxl").unet
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    wanted = {n for n, m in unet.named_modules() if isinstance(m, layers) and n.endswith(tuple(f".{x}" for x in names))}
    pipeline = setup.load_teacher(tiny.config(folder, "p"), Layout.make(-1, 1))
    delta = init(jax.random.key(0), pipeline.params["unet"], LoraConfig(2, 2.0, setup.LORA_TARGETS["sdxl"]["wide"]))
    modules = {path[:-2] for path, _ in keymap.leaves(delta)}  # without "kernel", "a"
    assert {name for path in modules for name, _ in keymap.module_names(path)} == wanted
