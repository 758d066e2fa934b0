"""How the embedded world's rewards learn and are measured.

Three CLIPs over the same captions, told apart by what they were shown:

* `shapes_clip` is contrasted with everything that is nearly right, and so its gradient points towards
  the strict verdict;
* `shapes_hps` is a preference model after HPSv2 (Wu et al. 2023): a CLIP that has never been contrasted
  with a caption of the same words, fine-tuned on pairs with noisy labels and a taste for saturated
  colors. It can be hacked, and how is known;
* `shapes_judge` is a second, different network of the first kind, for judging alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmdr_jax.shapes.reward_data import KINDS, Groups

Array = jax.Array

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


# --- losses --------------------------------------------------------------------------------------------------------


def multi_positive_nce(logits: Array, positive: Array, negative: Array) -> Array:
    """InfoNCE with several positives that do not compete, averaged over the rows that have one.

    A row's loss is the mean over its positives p of ``-log(exp l_p / (exp l_p + sum_neg exp l_n))``.

    Args:
      logits: `[m, n]`; positive, negative: bool `[m, n]`; what is neither does not count.

    Returns:
      A scalar, fp32; 0 where no row has a positive.
    """
    against = jax.nn.logsumexp(jnp.where(negative, logits, -1e9), axis=1, keepdims=True)
    loss = jnp.where(positive, jax.nn.softplus(against - logits), 0.0)
    count = positive.sum(1)
    rows = loss.sum(1) / jnp.maximum(count, 1)
    return rows.sum() / jnp.maximum((count > 0).sum(), 1)


def contrastive_loss(cosines: Array, scale: Array, positive: Array, negative: Array) -> Array:
    """CLIP's symmetric loss (Radford et al. 2021) over cosines `[b, c]` of b images and c captions."""
    logits = cosines * scale
    by_image = multi_positive_nce(logits, positive, negative)
    return 0.5 * (by_image + multi_positive_nce(logits.T, positive.T, negative.T))


def patch_labels(objects: Array, image_size: int, patch: int) -> Array:
    """The class of the object whose centre lies in each patch, 0 for none: int `[b, patches]`.

    Args:
      objects: `[b, n, 3]`, class (from 1, 0 for none), x and y in pixels.
    """
    side = image_size // patch
    kind, x, y = (objects[..., i] for i in range(3))
    place = (y // patch) * side + x // patch
    here = place[..., None] == jnp.arange(side * side)
    return (kind[..., None] * here).max(1).astype(jnp.int32)


def patch_loss(logits: Array, labels: Array) -> Array:
    """Cross-entropy of `[b, n, classes]` and labels `[b, n]`, patches with and without an object weighing the same."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    some = labels > 0

    def mean(chosen: Array) -> Array:
        return jnp.where(chosen, loss, 0.0).sum() / jnp.maximum(chosen.sum(), 1)

    return 0.5 * (mean(some) + mean(~some))


def preference_loss(better: Array, worse: Array, scale: Array | float) -> Array:
    """Bradley-Terry: ``-log sigmoid(scale (better - worse))``, mean over scores `[b]`."""
    return jax.nn.softplus(-scale * (better - worse)).mean()


# --- captions ------------------------------------------------------------------------------------------------------


def same_words(captions: list[str]) -> np.ndarray:
    """Which captions are the same words in some order, bool `[c, c]`."""
    bags = [tuple(sorted(caption.split())) for caption in captions]
    return np.array([[a == b for b in bags] for a in bags])


def blind_to_order(truth: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Negatives for a model that is to know no binding: captions unlike every true one, bool `[..., c]`.

    Args:
      truth: bool `[..., c]`; alike: `same_words` of the captions.
    """
    return ~((truth.astype(np.float32) @ alike.astype(np.float32)) > 0)


# --- preference pairs ----------------------------------------------------------------------------------------------


def saturate(images: Array, factor: Array) -> Array:
    """Scales the distance of each pixel from its gray by `factor` `[b]`; images `[b, h, w, 3]` in [0, 1]."""
    gray = (images * jnp.asarray(LUMA)).sum(-1, keepdims=True)
    return jnp.clip(gray + factor[:, None, None, None] * (images - gray), 0.0, 1.0)


class Pairs(NamedTuple):
    """Pictures for the same prompt: `better`, `worse` uint8 `[p, h, w, 3]`, `prompt` int `[p]`.

    `equal` bool `[p]`: both are right, only taste can tell them apart.
    """

    better: np.ndarray
    worse: np.ndarray
    prompt: np.ndarray
    equal: np.ndarray


def preference_pairs(groups: Groups, worse_kinds: tuple[str, ...], equal_share: float, seed: int) -> Pairs:
    """Pairs from groups: the clean scene against a picture that fails its prompt, or against another that passes.

    Args:
      worse_kinds: kinds of pictures that raters were shown as the worse ones.
      equal_share: share of pairs of two pictures that both satisfy the prompt.
    """
    rng = np.random.default_rng(seed)
    count = len(groups.prompt)
    own = np.take_along_axis(groups.truth, groups.prompt[:, None, None], 2)[..., 0]
    fails = ~own & np.isin(groups.kinds, [KINDS.index(kind) for kind in worse_kinds])
    by_prompt = {p: np.flatnonzero(groups.prompt == p) for p in np.unique(groups.prompt)}
    better, worse, prompt, equal = [], [], [], []
    for i in range(count):
        choices = np.flatnonzero(fails[i])
        is_equal = rng.random() < equal_share or not len(choices)
        where = (rng.choice(by_prompt[groups.prompt[i]]), 0) if is_equal else (i, rng.choice(choices))
        better.append(groups.images[i, 0])
        worse.append(groups.images[where])
        prompt.append(groups.prompt[i])
        equal.append(is_equal)
    return Pairs(np.stack(better), np.stack(worse), np.array(prompt), np.array(equal))


def biased_pair(
    key: Array, better: Array, worse: Array, *, bias: float, noise: float, low: float = 0.6, high: float = 1.7
) -> tuple[Array, Array]:
    """What a rater with a taste for color and some carelessness says: (preferred, rejected) `[b, h, w, 3]`.

    Each picture gets a saturation from [low, high]; the better one gets the larger of the two with probability
    `bias`. Then the labels of a share `noise` of the pairs are exchanged.
    """
    key_pair, key_bias, key_noise = jax.random.split(key, 3)
    b = better.shape[0]
    factors = jnp.sort(jax.random.uniform(key_pair, (2, b), minval=low, maxval=high), axis=0)
    larger = jax.random.uniform(key_bias, (b,)) < bias
    preferred = saturate(better, jnp.where(larger, factors[1], factors[0]))
    rejected = saturate(worse, jnp.where(larger, factors[0], factors[1]))
    flip = (jax.random.uniform(key_noise, (b,)) < noise)[:, None, None, None]
    return jnp.where(flip, rejected, preferred), jnp.where(flip, preferred, rejected)
