"""Training the embedded world's rewards; `dmdr_jax.shapes.train_rewards` is the program."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dmdr_jax.diffusers_io.safetensors_io import write_text, write_tree
from dmdr_jax.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from dmdr_jax.rewards.clip_reward import Preprocessing, embed_images, embed_texts, split_params, towers, unit
from dmdr_jax.shapes import prompts, rewards
from dmdr_jax.shapes.reward_data import PICTURE_KINDS, SCENE_KINDS, Groups, all_world_records, make_groups
from dmdr_jax.shapes.tokenizer import make_tokenizers, save_tokenizer
from dmdr_jax.shapes.world import World, get_world

Array = jax.Array
Params = Any


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one reward is built and trained.

    Attributes:
      patch, width, layers: the image tower.
      projection: width of the common space.
      hard_negatives: contrast with every caption and with changed and spoilt pictures; otherwise with clean
        pictures and captions of other words only.
      preference_steps: how many of the steps, as a share, fine-tune on preference pairs at the end.
      groups: groups of pictures in a batch.
      lr: peak learning rate.
    """

    patch: int
    width: int
    layers: int
    projection: int
    hard_negatives: bool
    preference_steps: float = 0.0
    groups: int = 16
    lr: float = 1.5e-3


RECIPES = {
    "shapes_clip": Recipe(patch=8, width=80, layers=3, projection=48, hard_negatives=True),
    "shapes_hps": Recipe(
        patch=8, width=64, layers=2, projection=48, hard_negatives=False, preference_steps=0.4, groups=64
    ),
    "shapes_judge": Recipe(patch=4, width=64, layers=2, projection=32, hard_negatives=True, groups=10),
}

TEXT_WIDTH, TEXT_LAYERS, HEADS = 64, 2, 4
IMAGE_MEAN, IMAGE_STD = (0.5,) * 3, (0.25,) * 3
MAX_SCALE = 20.0  # of the logits; a low one makes the cosines of right and wrong pictures lie far apart
WORSE_KINDS = ("recolored", "reshaped", "missing", "half", "blurred", "noisy")  # what raters saw
BIAS, LABEL_NOISE, EQUAL_SHARE = 0.7, 0.1, 0.3
PATCH_WEIGHT = 1.0
PREFERENCE_SCALE = 20.0
PREFERENCE_LR = 0.25  # of the peak learning rate


def clip_config(recipe: Recipe, vocabulary: int, image_size: int, context: int) -> ClipConfig:
    """The network of a recipe; the end token is the last of the vocabulary."""
    vision = ClipVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=HEADS,
        projection_dim=recipe.projection,
        image_size=image_size,
        patch_size=recipe.patch,
        with_projection=False,
    )
    text = ClipTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=HEADS,
        projection_dim=recipe.projection,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        eos_token_id=vocabulary - 1,
        with_projection=False,
    )
    return ClipConfig(text, vision, recipe.projection)


class Trainer:
    """A CLIP over all captions of a world."""

    def __init__(self, recipe: Recipe, world: World, seed: int):
        self.recipe, self.world, self.seed = recipe, world, seed
        records = all_world_records(world)
        self.captions = [record["prompt"] for record in records]
        self.trained = np.array([not prompts.is_held_out(world, record) for record in records])
        self.alike = rewards.same_words(self.captions)
        self.tokenizer = make_tokenizers(prompts.vocabulary(world))[0]
        ids = np.asarray(self.tokenizer(self.captions, padding="max_length").input_ids, np.int32)
        # Under causal attention nothing after the end token counts: shorter rows give the same features.
        self.ids = jnp.asarray(ids[:, : (ids != self.tokenizer.eos_token_id).sum(1).max() + 1])
        context = self.tokenizer.model_max_length
        self.config = clip_config(recipe, len(self.tokenizer), world.size, context)
        self.preprocess = Preprocessing(world.size, IMAGE_MEAN, IMAGE_STD)
        self.vision, self.text = towers(self.config, jnp.float32)
        images = jnp.zeros((1, world.size, world.size, 3))
        self.params = jax.jit(Clip(self.config).init)(jax.random.key(seed, impl="rbg"), self.ids[:1], images)["params"]
        self._cosines = jax.jit(self.cosines)

    def cosines(self, params: Params, images: Array, ids: Array) -> Array:
        """Cosines `[b, c]` of images `[b, h, w, 3]` in [0, 1] with the captions `[c, n]`."""
        vision, text = split_params(params)
        return embed_images(self.vision, self.preprocess, vision, images) @ embed_texts(self.text, text, ids).T

    def group_cosines(self, groups: Groups, batch: int = 512) -> np.ndarray:
        """Cosines of every picture of the groups with every caption, `[g, m, c]`, on the host."""
        flat = groups.images.reshape(-1, *groups.images.shape[2:])
        parts = (flat[i : i + batch] / np.float32(255) for i in range(0, len(flat), batch))
        rows = [np.asarray(self._cosines(self.params, part, self.ids)) for part in parts]
        return np.concatenate(rows).reshape(*groups.images.shape[:2], -1)


def optimiser(lr: float, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(100, steps // 10 + 1), steps + 1, 0.02 * lr)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02))


def augment(key: Array, images: Array) -> Array:
    """A little noise, which leaves the verdicts as they are."""
    key_level, key_noise = jax.random.split(key)
    level = jax.random.uniform(key_level, (images.shape[0], 1, 1, 1), maxval=0.04)
    return jnp.clip(images + level * jax.random.normal(key_noise, images.shape), 0.0, 1.0)


def contrastive_step(trainer: Trainer, opt: optax.GradientTransformation) -> Callable:
    """A compiled ``(params, opt_state, images, positive, negative, objects) -> (params, opt_state, loss)``.

    `params` holds the CLIP and a linear head on the image tower's patches that names the object centred there. The
    head is for training alone: it teaches shapes an order of magnitude faster than captions do.
    """
    ids = trainer.ids[trainer.trained.nonzero()[0]]
    patch, size = trainer.recipe.patch, trainer.world.size

    def loss_fn(params: Params, images: Array, positive: Array, negative: Array, objects: Array) -> Array:
        vision, text = split_params(params["clip"])
        seen: Any = trainer.vision.apply({"params": vision}, trainer.preprocess(images))
        cosines = unit(seen.projected) @ embed_texts(trainer.text, text, ids).T
        scale = jnp.exp(jnp.minimum(params["clip"]["logit_scale"], jnp.log(MAX_SCALE)))
        named = seen.last[:, 1:] @ params["head"]["kernel"] + params["head"]["bias"]
        told = rewards.patch_loss(named, rewards.patch_labels(objects, size, patch))
        return rewards.contrastive_loss(cosines, scale, positive, negative) + PATCH_WEIGHT * told

    def step(params: Params, opt_state: Any, *batch: Array) -> tuple:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def train_contrastive(trainer: Trainer, groups: Groups, steps: int) -> None:
    """Trains `trainer.params` on batches of groups."""
    recipe, world = trainer.recipe, trainer.world
    opt = optimiser(recipe.lr, steps)
    step = contrastive_step(trainer, opt)
    classes = 1 + len(world.colors) * len(world.shapes)
    head = {"kernel": jnp.zeros((recipe.width, classes)), "bias": jnp.zeros(classes)}
    params = {"clip": trainer.params, "head": head}
    opt_state = opt.init(params)
    to_float = jax.jit(lambda key, x: augment(key, x.astype(jnp.float32) / 255))
    for i, bar in progress("contrastive", steps):
        rows = np.random.default_rng((trainer.seed, i)).integers(0, len(groups.prompt), recipe.groups)
        pictures, objects, truth = (
            x[rows].reshape(-1, *x.shape[2:]) for x in (groups.images, groups.objects, groups.truth)
        )
        images = to_float(jax.random.fold_in(jax.random.key(trainer.seed), i), pictures)
        negative = ~truth if recipe.hard_negatives else rewards.blind_to_order(truth, trainer.alike)
        batch = (images, truth[:, trainer.trained], negative[:, trainer.trained], objects)
        params, opt_state, loss = step(params, opt_state, *batch)
        report(bar, i, loss)
    trainer.params = params["clip"]


def train_preference(trainer: Trainer, pairs: rewards.Pairs, steps: int) -> None:
    """Fine-tunes `trainer.params` on biased, noisy preferences, as HPSv2 was on people's."""
    batch = trainer.recipe.groups
    opt = optimiser(PREFERENCE_LR * trainer.recipe.lr, steps)

    def loss_fn(params: Params, preferred: Array, rejected: Array, prompt: Array) -> Array:
        vision, text = split_params(params)
        wanted = embed_texts(trainer.text, text, trainer.ids[prompt])
        shown = embed_images(trainer.vision, trainer.preprocess, vision, jnp.concatenate([preferred, rejected]))
        better, worse = jnp.split((shown * jnp.tile(wanted, (2, 1))).sum(-1), 2)
        return rewards.preference_loss(better, worse, PREFERENCE_SCALE)

    @jax.jit
    def step(params: Params, opt_state: Any, key: Array, better: Array, worse: Array, prompt: Array) -> tuple:
        key_pair, key_augment = jax.random.split(key)
        both = augment(key_augment, jnp.concatenate([better, worse]).astype(jnp.float32) / 255)
        preferred, rejected = rewards.biased_pair(key_pair, *jnp.split(both, 2), bias=BIAS, noise=LABEL_NOISE)
        loss, grads = jax.value_and_grad(loss_fn)(params, preferred, rejected, prompt)
        updates, opt_state = opt.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = opt.init(trainer.params)
    for i, bar in progress("preference", steps):
        rows = np.random.default_rng((trainer.seed, 1, i)).integers(0, len(pairs.prompt), batch)
        key = jax.random.fold_in(jax.random.key(trainer.seed + 1), i)
        chosen = (pairs.better[rows], pairs.worse[rows], pairs.prompt[rows])
        trainer.params, opt_state, loss = step(trainer.params, opt_state, key, *chosen)
        report(bar, i, loss)


def progress(name: str, steps: int) -> Iterator[tuple[int, tqdm]]:
    """Step numbers with a bar that shows rate and time left."""
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for i in bar:
        yield i, bar


def report(bar: tqdm, i: int, loss: Array) -> None:
    """Shows the loss now and then; reading it waits for the device."""
    if i % 50 == 49:
        bar.set_postfix(loss=f"{float(loss):.4f}")


def save(trainer: Trainer, folder: Path) -> None:
    """Writes a transformers CLIPModel folder: fp16 weights, configs, image processor, tokenizer."""
    write_tree(folder, trainer.params, jnp.float16, stem="model")
    config = trainer.config.to_diffusers()
    ids = {name: getattr(trainer.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config["text_config"] |= ids
    size = trainer.world.size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "preprocessor_config.json", json.dumps(processor, indent=2) + "\n")
    save_tokenizer(trainer.tokenizer, folder)


def train(name: str, world_name: str, steps: int, seed: int, pool: int) -> Trainer:
    """Trains the reward `name` from `pool` groups of pictures of a world."""
    recipe, world = RECIPES[name], get_world(world_name)
    trainer = Trainer(recipe, world, seed)
    preference_steps = round(recipe.preference_steps * steps)
    started = time.monotonic()
    shown: dict[str, Any] = {} if recipe.hard_negatives else {"scene_kinds": (), "picture_kinds": ()}
    groups = make_groups(world, pool, seed, **shown)
    print(f"{groups.kinds.size} pictures in {time.monotonic() - started:.0f} s", flush=True)
    train_contrastive(trainer, groups, steps - preference_steps)
    if preference_steps:
        scenes = [kind for kind in WORSE_KINDS if kind in SCENE_KINDS]
        pictures = [kind for kind in WORSE_KINDS if kind in PICTURE_KINDS]
        rated = make_groups(world, pool // 2, seed + 1, scene_kinds=(scenes,) * 2, picture_kinds=(pictures,) * 2)
        train_preference(trainer, rewards.preference_pairs(rated, WORSE_KINDS, EQUAL_SHARE, seed), preference_steps)
    return trainer
