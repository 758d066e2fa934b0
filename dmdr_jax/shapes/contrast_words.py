"""Which words a contrast of texts (SRPO) can use in the embedded world: all pairs that its rewards can read, measured.

    python -m dmdr_jax.shapes.contrast_words --reward shapes_hps

`unbiased` is how often the right one of two pictures scores higher, `taste` how often the more saturated one of two
right pictures does: what a contrast is to take away. Seconds on one CPU core.
"""

import argparse
import itertools

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.shapes.train_rewards import NAMES

POSITIVE, NEGATIVE = ("and",), ("below",)
"""What `dmdr_srpo` takes for these rewards, which know some twenty words and spell the authors' letter by letter."""
WORLD = "small"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.make_parser(__doc__)
    parser.add_argument("--reward", default="shapes_hps", choices=NAMES, help="whose texts (default: shapes_hps)")
    parser.add_argument("--k", type=float, default=0.1, help="config.srpo.contrast (default: 0.1)")
    parser.add_argument("--most_taste", type=float, default=0.6, help="leave out pairs above (default: 0.6)")
    parser.add_argument("--count", type=int, default=10, help="pairs to print (default: 10)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Prints what the prompts alone are worth, and then the best pairs."""
    if args.count < 1:
        raise UserError("--count must be at least 1.")
    print(f"{'':24} unbiased   taste")
    alone, pairs = measure(args.reward, args.k)
    print(line("the prompt alone", alone))
    found = sorted(pairs.items(), key=lambda item: -item[1]["preference/unbiased"])
    kept = [item for item in found if item[1]["preference/taste"] <= args.most_taste]
    for (positive, negative), metrics in kept[: args.count]:
        print(line(f"{positive!r} - {negative!r}", metrics))


def line(name: str, metrics: dict[str, float]) -> str:
    return f"{name:24} {metrics['preference/unbiased']:8.3f} {metrics['preference/taste']:7.3f}"


def measure(name: str, k: float) -> tuple[dict[str, float], dict[tuple[str, str], dict[str, float]]]:
    """`preference_metrics` of a shipped reward by its prompts alone, and by the contrast of each pair of words.

    On the pictures and prompts that the reward was measured on after its training (metrics.json's `seen/`).
    """
    import jax
    import jax.numpy as jnp

    from dmdr_jax.rewards.base import RewardSpec
    from dmdr_jax.rewards.clip_reward import load_clip_reward
    from dmdr_jax.rewards.contrast import SEPARATOR, contrasted
    from dmdr_jax.shapes import prompts
    from dmdr_jax.shapes.assets import resolve
    from dmdr_jax.shapes.reward_data import all_world_records, make_groups
    from dmdr_jax.shapes.reward_measures import TEST_GROUPS, TEST_SEED, PairFeatures, preference_metrics
    from dmdr_jax.shapes.reward_training import EQUAL_SHARE, WORSE_KINDS
    from dmdr_jax.shapes.rewards import preference_pairs
    from dmdr_jax.shapes.world import get_world

    world = get_world(WORLD)
    reward = load_clip_reward(RewardSpec(name, resolve(f"shapes:rewards/{name}")))
    groups = make_groups(world, TEST_GROUPS, TEST_SEED, "train")
    pairs = preference_pairs(groups, WORSE_KINDS, EQUAL_SHARE, TEST_SEED)
    shown = PairFeatures.of(pairs, reward.image_features)
    records = all_world_records(world)

    def features(prefix: str) -> jax.Array:
        texts = [prefix + records[index]["prompt"] for index in pairs.prompt]
        return reward.text_features(reward.tokenize(texts))

    behind = {word: features(word + SEPARATOR) for word in prompts.vocabulary(world)}
    return preference_metrics(shown, features("")), {
        (positive, negative): preference_metrics(
            shown, contrasted(jnp.stack([behind[positive], behind[negative]], 1), k)
        )
        for positive, negative in itertools.permutations(behind, 2)
    }


if __name__ == "__main__":
    cli.run(main, make_parser())
