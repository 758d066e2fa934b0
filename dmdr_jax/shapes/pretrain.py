"""Makes the embedded world's teacher: ``python -m dmdr_jax.shapes.pretrain --config=... --out=DIR``.

Two stages, each resumed or skipped by what it finds in DIR/work: the autoencoder, then the
transformer with its text encoders. DIR/pipeline is written every ``teacher.save_every`` steps: a
diffusers folder in half precision, scored on prompts not trained on.
"""

import functools
import json
import pickle
import time
from pathlib import Path
from typing import Any

from absl import flags

from dmdr_jax import cli

flags.DEFINE_string("out", None, "Folder for the run; the same command goes on where it stopped.", required=True)
cli.define_config("configs/shapes/pretrain_sd3.py")

Tree = Any

CLASSES = {
    "transformer": "SD3Transformer2DModel",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


def component_configs(config: Any, vocabulary: int, eos: int, vae_statistics: tuple[float, float]) -> dict[str, dict]:
    """The four networks' config.json contents."""
    vae = dict(config.vae.model)
    levels = len(vae["block_out_channels"])
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae |= {"scaling_factor": vae_statistics[0], "shift_factor": vae_statistics[1], "act_fn": "silu"}
    text = dict(config.text)
    clip = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": vocabulary,
        "num_attention_heads": text.pop("heads"),
        "max_position_embeddings": config.context,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": eos - 1,
        "eos_token_id": eos,
        "pad_token_id": eos,
        **text,
    }
    second = clip | {"hidden_act": "gelu", "pad_token_id": 0}
    return {
        "transformer": dict(config.transformer),
        "vae": {k: list(v) if isinstance(v, tuple) else v for k, v in vae.items()},
        "text_encoder": clip,
        "text_encoder_2": second,
    }


def autoencoder(config: Any, work: Path) -> tuple[Any, Tree, tuple[float, float]]:
    """The trained autoencoder, its parameters and latent statistics; trained only if DIR/work has none."""
    import jax
    import numpy as np

    from dmdr_jax.diffusers_io.components import build_module
    from dmdr_jax.shapes.pretrain_vae import finetune_decoder, train_vae
    from dmdr_jax.shapes.world import get_world

    vae = build_module("AutoencoderKL", component_configs(config, 2, 1, (1.0, 0.0))["vae"])
    file = work / "vae.pkl"
    if not file.exists():
        settings = {k: config.vae[k] for k in ("steps", "batch", "lr", "kl_weight")}
        params, statistics = train_vae(vae, get_world(config.world), seed=config.seed, **settings)
        params = finetune_decoder(vae, params, get_world(config.world), seed=config.seed + 7, **config.vae.decoder)
        write_whole(file, (jax.tree.map(np.asarray, params), statistics))
    params, statistics = pickle.loads(file.read_bytes())
    return vae, params, statistics


def write_whole(file: Path, value: Any) -> None:
    """Pickles to a file that is there whole or not at all."""
    fresh = file.with_suffix(".tmp")
    fresh.write_bytes(pickle.dumps(value))
    fresh.replace(file)


def scene_set(config: Any, vae: Any, vae_params: Tree, statistics: tuple[float, float], tokenizers: Any) -> Any:
    """Renders and encodes the training scenes; chunked, so that images never pile up."""
    import numpy as np

    from dmdr_jax.shapes import prompts, render
    from dmdr_jax.shapes.pretrain_teacher import SceneSet
    from dmdr_jax.shapes.pretrain_vae import encode_images
    from dmdr_jax.shapes.world import get_world

    world, rng, latents, captions = get_world(config.world), np.random.default_rng(config.seed + 2), [], []
    for _ in range(0, config.teacher.scenes, 4096):
        scenes, words = prompts.sample_batch(world, 4096, rng)
        raw = encode_images(vae, vae_params, render.render(world, scenes))
        latents.append((raw - statistics[1]) * statistics[0])
        rich = rng.random(len(words)) < config.teacher.rich_captions
        captions += [prompts.rich_caption(world, s, rng) if r else w for s, w, r in zip(scenes, words, rich)]
    return SceneSet(np.concatenate(latents), token_ids(tokenizers, captions))


def token_ids(tokenizers: Any, captions: list[str]) -> dict[str, Any]:
    """``[n, context]`` int32 by text encoder."""
    import numpy as np

    names = ("text_encoder", "text_encoder_2")
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    return {n: np.asarray(t(captions, **padded)["input_ids"], np.int32) for n, t in zip(names, tokenizers)}


def teacher_modules(configs: dict[str, dict]) -> dict[str, Any]:
    """The networks the second stage trains."""
    from dmdr_jax.diffusers_io.components import build_module

    return {name: build_module(class_name, configs[name]) for name, class_name in CLASSES.items()}


def train_teacher(config: Any, out: Path) -> None:
    """The second stage; saves state and folder every ``save_every`` steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from dmdr_jax.diffusers_io.components import init_params
    from dmdr_jax.diffusers_io.pipeline import new_pipeline_folder
    from dmdr_jax.diffusers_io.text import encode
    from dmdr_jax.diffusion.denoiser import Denoiser
    from dmdr_jax.diffusion.process import Flow
    from dmdr_jax.shapes import pretrain_teacher as training
    from dmdr_jax.shapes.prompts import vocabulary
    from dmdr_jax.shapes.score import strict_scores
    from dmdr_jax.shapes.tokenizer import make_tokenizers
    from dmdr_jax.shapes.world import get_world

    work, settings, world = out / "work", config.teacher, get_world(config.world)
    vae, vae_params, statistics = autoencoder(config, work)
    tokenizers = make_tokenizers(vocabulary(world), config.context)
    configs = component_configs(config, len(tokenizers[0]), tokenizers[0].eos_token_id, statistics)
    modules = teacher_modules(configs)
    denoiser = Denoiser(modules["transformer"], Flow())
    scenes = scene_set(config, vae, vae_params, statistics, tokenizers)
    empty = token_ids(tokenizers, [""])
    loss_fn = lambda params, latents, ids, key: training.flow_matching_loss(  # noqa: E731
        denoiser, functools.partial(encode, modules), params, latents, ids, empty, key, settings.uncond_probability
    )
    optimiser = training.make_optimiser(settings.lr, settings.warmup, settings.steps)
    step_fn = training.make_step(loss_fn, optimiser, settings.ema, config.seed + 3)

    def initialise() -> training.TeacherState:
        keys = jax.random.split(jax.random.key(config.seed + 4), len(modules))
        params = {name: init_params(CLASSES[name], modules[name], key) for key, name in zip(keys, modules)}
        ema = jax.tree.map(jnp.copy, params)
        return training.TeacherState(jnp.zeros((), jnp.int32), params, optimiser.init(params), ema)

    file = work / "teacher.pkl"
    state = jax.tree.map(jnp.asarray, pickle.loads(file.read_bytes())) if file.exists() else jax.jit(initialise)()
    start = int(state.step)
    bar = tqdm(total=settings.steps, initial=start, desc="teacher", mininterval=10)
    losses, began = [], time.time()
    for i, (latents, ids) in zip(range(start, settings.steps), scenes.batches(settings.batch, config.seed + 5, start)):
        state, loss = step_fn(state, latents, ids)
        losses.append(loss)
        bar.update()
        if (i + 1) % settings.save_every == 0 or i + 1 == settings.steps:
            bar.set_postfix(loss=f"{np.mean(jax.device_get(losses)):.4f}")
            write_whole(file, jax.device_get(state))
            folder = new_pipeline_folder(
                out / "pipeline",
                configs,
                {**jax.device_get(state.ema), "vae": vae_params},
                dict(zip(("text_encoder", "text_encoder_2"), tokenizers)),
                {"num_train_timesteps": 1000, "shift": settings.shift},
                dtype=jnp.float16,
                overwrite=True,
            )
            record = {"step": i + 1, "loss": float(np.mean(jax.device_get(losses))), "seconds": time.time() - began}
            record |= strict_scores(folder, world)
            with open(out / "curve.jsonl", "a", encoding="utf-8") as curve:
                curve.write(json.dumps(record) + "\n")
            losses = []


def main(config: Any) -> None:
    out = Path(flags.FLAGS.out)
    (out / "work").mkdir(parents=True, exist_ok=True)
    train_teacher(config, out)


if __name__ == "__main__":
    cli.run(main)
