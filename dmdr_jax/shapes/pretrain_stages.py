"""The two stages of a teacher's making: the autoencoder, then the denoiser with its text encoders.

Each is resumed or skipped by what it finds in DIR/work. DIR/pipeline is written every ``teacher.save_every`` steps: a
diffusers folder in half precision, scored on prompts not trained on.
"""

import json
import pickle
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dmdr_jax.diffusers_io.components import FAMILIES, build_module, init_params
from dmdr_jax.diffusers_io.pipeline import load_pipeline, new_pipeline_folder, process_of
from dmdr_jax.diffusion.denoiser import Denoiser
from dmdr_jax.errors import UserError
from dmdr_jax.models.autoencoder import latents_from_raw
from dmdr_jax.shapes import pretrain_teacher as training
from dmdr_jax.shapes import prompts, render
from dmdr_jax.shapes.assets import resolve
from dmdr_jax.shapes.pretrain_teacher import SceneSet
from dmdr_jax.shapes.pretrain_vae import centre_latents, encode_images, finetune_decoder, train_vae
from dmdr_jax.shapes.score import strict_scores
from dmdr_jax.shapes.tokenizer import make_tokenizers
from dmdr_jax.shapes.world import get_world

Tree = Any

CHUNK = 4096  # scenes rendered at a time
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def family_of(config: Any) -> Any:
    """The kind of pipeline that ``config.family`` names."""
    families = {family.name: family for family in FAMILIES.values()}
    if config.family not in families:
        raise UserError(f"config.family is {config.family!r}; choose one of: {', '.join(families)}.")
    return families[config.family]


def component_configs(config: Any, vocabulary: int, eos: int, vae: dict[str, Any]) -> dict[str, dict]:
    """The four networks' config.json contents; ``vae`` is the autoencoder's own."""
    text = dict(config.text)
    clip = {
        "model_type": "clip_text_model",
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
    denoiser = {k: list(v) if isinstance(v, tuple) else v for k, v in config.denoiser.items()}
    return {family_of(config).denoiser: denoiser, "vae": vae, "text_encoder": clip, "text_encoder_2": second}


def autoencoder(config: Any, work: Path) -> tuple[dict[str, Any], Tree]:
    """The autoencoder's config.json contents and parameters, of the folder ``vae.source`` or trained in DIR/work."""
    if config.vae.source:
        return centred_autoencoder(config)
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in config.vae.model.items()}
    levels = len(shape["block_out_channels"])
    shape |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    vae: Any = build_module("AutoencoderKL", shape)
    file = work / "vae.pkl"
    if not file.exists():
        settings = {k: config.vae[k] for k in ("steps", "batch", "lr", "kl_weight")}
        start = load_autoencoder(config.vae.start).params["vae"] if config.vae.start else None
        params, statistics = train_vae(vae, get_world(config.world), seed=config.seed, start=start, **settings)
        params = finetune_decoder(vae, params, get_world(config.world), seed=config.seed + 7, **config.vae.decoder)
        write_whole(file, (jax.tree.map(np.asarray, params), statistics))
    params, (scaling_factor, shift_factor) = pickle.loads(file.read_bytes())
    return shape | {"scaling_factor": scaling_factor, "shift_factor": shift_factor, "act_fn": "silu"}, params


def load_autoencoder(folder: str) -> Any:
    """The autoencoder of a pipeline's folder, or of a shipped one, as a pipeline without the rest."""
    return load_pipeline(resolve(folder), ["vae"])


def centred_autoencoder(config: Any) -> tuple[dict[str, Any], Tree]:
    """Another folder's autoencoder with its latents centred, as SDXL's pipeline knows a scale but no shift.

    The two 1 x 1 convolutions that SDXL's autoencoder has beside its latents subtract and add each channel's mean,
    so that the codec is the same function.
    """
    source = load_autoencoder(config.vae.source)
    vae: Any = source.modules["vae"]
    params, scaling_factor = centre_latents(vae, source.params["vae"], get_world(config.world))
    centred = {"use_quant_conv": True, "use_post_quant_conv": True, "scaling_factor": scaling_factor}
    shape = {k: v for k, v in source.configs["vae"].items() if k != "shift_factor" and not k.startswith("_")}
    return shape | centred, params


def write_whole(file: Path, value: Any) -> None:
    """Pickles to a file that is there whole or not at all."""
    fresh = file.with_suffix(".tmp")
    fresh.write_bytes(pickle.dumps(value))
    fresh.replace(file)


def scene_set(config: Any, vae: Any, vae_params: Tree, tokenizers: Any) -> Any:
    """Renders and encodes the training scenes; chunked, so that images never pile up."""
    world, rng, latents, captions = get_world(config.world), np.random.default_rng(config.seed + 2), [], []
    for start in range(0, config.teacher.scenes, CHUNK):
        scenes, words = prompts.sample_batch(world, min(CHUNK, config.teacher.scenes - start), rng)
        raw: Any = encode_images(vae, vae_params, render.render(world, scenes))
        latents.append(latents_from_raw(raw, vae.config))
        rich = rng.random(len(words)) < config.teacher.rich_captions
        captions += [prompts.rich_caption(world, s, rng) if r else w for s, w, r in zip(scenes, words, rich)]
    return SceneSet(np.concatenate(latents), token_ids(tokenizers, captions))


def token_ids(tokenizers: Any, captions: list[str]) -> dict[str, Any]:
    """``[n, context]`` int32 by text encoder."""
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "np"}
    return {n: np.asarray(t(captions, **padded)["input_ids"], np.int32) for n, t in zip(TEXT_ENCODERS, tokenizers)}


def started(params: dict[str, Tree], tokenizers: Any, folder: str) -> dict[str, Tree]:
    """Fresh networks with the weights of a pipeline's folder, which may know fewer words and shorter prompts.

    A word's embedding is that of the same word; of a longer table of positions the first are the folder's.
    """
    source = load_pipeline(resolve(folder), list(params))

    def begin(name: str, path: Any, fresh: Any, known: Any) -> Any:
        if any("token_embedding" in key.key for key in path):
            ours, theirs = (t.get_vocab() for t in (tokenizers[TEXT_ENCODERS.index(name)], source.tokenizers[name]))
            words = sorted(ours.keys() & theirs.keys())
            rows, known = jnp.asarray([ours[word] for word in words]), known[jnp.asarray([theirs[w] for w in words])]
        else:
            rows = jnp.arange(len(known))
        if fresh.shape[1:] != known.shape[1:] or len(fresh) < len(known):
            where = "/".join(key.key for key in path)
            raise UserError(
                f"config.teacher.start={folder}: {name}/{where} is {known.shape} there and {fresh.shape} here."
            )
        return fresh.at[rows].set(known)

    return {
        name: jax.tree_util.tree_map_with_path(partial(begin, name), tree, source.params[name])
        for name, tree in params.items()
    }


def train_teacher(config: Any, out: Path) -> None:
    """The second stage; saves state and folder every ``save_every`` steps."""
    work, settings, world, family = out / "work", config.teacher, get_world(config.world), family_of(config)
    vae_config, vae_params = autoencoder(config, work)
    tokenizers = make_tokenizers(prompts.vocabulary(world), config.context)
    configs = component_configs(config, len(tokenizers[0]), tokenizers[0].eos_token_id, vae_config)
    modules = {name: build_module(family.classes[name][1], configs[name]) for name in configs}
    trained = [name for name in modules if name != "vae"]
    scheduler = dict(config.scheduler)
    denoiser = Denoiser(modules[family.denoiser], process_of(family, scheduler))
    scenes = scene_set(config, modules["vae"], vae_params, tokenizers)
    zeros = bool(family.settings.get("force_zeros_for_empty_prompt"))
    loss_fn = training.make_loss(
        denoiser, modules, (world.size,) * 2, token_ids(tokenizers, [""]), zeros, settings.uncond_probability
    )
    optimiser = training.make_optimiser(settings.lr, settings.warmup, settings.steps)
    step_fn = training.make_step(loss_fn, optimiser, settings.ema, config.seed + 3)

    def first_params() -> dict[str, Tree]:
        keys = jax.random.split(jax.random.key(config.seed + 4), len(trained))
        return {n: init_params(family.classes[n][1], modules[n], key) for key, n in zip(keys, trained)}

    file = work / "teacher.pkl"
    if file.exists():
        state = jax.tree.map(jnp.asarray, pickle.loads(file.read_bytes()))
    else:
        params = jax.jit(first_params)()
        if settings.start:
            params = started(params, tokenizers, settings.start)
        ema = jax.tree.map(jnp.copy, params)
        state = training.TeacherState(jnp.zeros((), jnp.int32), params, optimiser.init(params), ema)
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
                dict(zip(TEXT_ENCODERS, tokenizers)),
                scheduler,
                dtype=jnp.float16,
                overwrite=True,
                family=family,
            )
            record = {"step": i + 1, "loss": float(np.mean(jax.device_get(losses))), "seconds": time.time() - began}
            record |= strict_scores(folder, world)
            with open(out / "curve.jsonl", "a", encoding="utf-8") as curve:
                curve.write(json.dumps(record) + "\n")
            losses = []
