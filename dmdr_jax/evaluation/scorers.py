"""Rewards as judges of image files: what is asked for, opened one at a time, and every score kept.

A score is a function of the reward, the image's bytes and the prompt, and is kept under these three: images are
scored once, however often an evaluation is killed, repeated or widened.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.data.survey import overlong
from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.images import read_images
from dmdr_jax.evaluation.journal import Journal, key_of
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.kinds import KINDS, Kind, find_kind
from dmdr_jax.rewards.registry import open_spec, parse_reward
from dmdr_jax.shapes.assets import resolve

BATCH = 32  # images scored at a time
SAMPLES = 64  # numbers of each parameter that stand for it
# What changes a loss and not a score.
_OF_THE_LOSS = ("name", "weight", "margin", "units", "mean", "std", "start", "ramp")


def parse_rewards(texts: Iterable[str]) -> list[RewardSpec]:
    """Reads ``NAME=PATH[,tokenizer=FOLDER...]`` for each reward.

    Raises:
      UserError: one is malformed, of no known kind, or named twice.
    """
    specs = [parse_reward(text, resolve) for text in texts]
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"two rewards are called {repeated[0]!r}: write NAME=PATH with a name of its own for each.")
    for spec in specs:
        kind(spec)
    return specs


def kind(spec: RewardSpec) -> Kind:
    """What kind of reward a spec means."""
    return KINDS[find_kind(spec.name, spec.kind, spec.path)]


def fingerprint(tree: Any) -> str:
    """What a tree of arrays is known by: shapes and some numbers of every leaf.

    Training changes every parameter, so a sample tells two states of one network apart without reading gigabytes.
    """
    seen = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        seen.update(f"{jax.tree_util.keystr(path)} {jnp.shape(leaf)} {jnp.result_type(leaf)}".encode())
        flat = jnp.ravel(leaf)
        chosen = np.linspace(0, max(flat.size - 1, 0), min(SAMPLES, flat.size)).round().astype(int)
        seen.update(np.asarray(flat[chosen]).tobytes())
    return seen.hexdigest()


def identity(reward: Reward, dtype: str) -> str:
    """What a reward's scores are known by: its settings, its weights, or the source of a function of one's own."""
    settings = {k: v for k, v in dataclasses.asdict(reward.spec).items() if k not in _OF_THE_LOSS}
    weights = fingerprint([reward.params, getattr(reward, "text_params", None)])
    function = getattr(reward, "function", None)
    source = "" if function is None else source_of(function)
    return key_of(settings, weights, source, dtype, str(getattr(reward, "preprocess", "")))


def source_of(function: Callable) -> str:
    """The file that a function is in: what it calls may lie beside it."""
    try:
        return Path(inspect.getfile(function)).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):
        return repr(function)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward that can be opened, and the journal of what it has scored.

    Attributes:
      spec: the reward.
      dtype: of its towers.
      known_as: see `identity`.
      journal: of its scores.
      reads: its tokenizer and the number of tokens that it reads; None for one that has none.
    """

    spec: RewardSpec
    dtype: str
    known_as: str
    journal: Journal
    reads: tuple[Any, int] | None = None

    @classmethod
    def make(cls, spec: RewardSpec, dtype: str, work: Path, writer: int) -> "Scorer":
        """Opens the reward once, so that a mistake shows before anything long begins.

        Raises:
          UserError: the reward cannot be read.
        """
        reward = open_spec(spec, jnp.dtype(dtype))
        known_as, tokenizer = identity(reward, dtype), getattr(reward, "tokenizer", None)
        reads = None if tokenizer is None else (tokenizer, reward.tokenize([""]).shape[-1])
        return cls(spec, dtype, known_as, Journal(work / f"{spec.name}-{known_as[:10]}", writer), reads)

    def score(
        self, files: Sequence[Path], names: Sequence[str], prompts: Sequence[str], progress: Callable[[int], Any]
    ) -> None:
        """Scores the images that have no score yet.

        Args:
          names: digests of the files.
          prompts: one per file.
          progress: called with the number of images done, those known from before at once.
        """
        keys = list(map(score_key, names, prompts))
        opened: list[Reward] = []

        def compute(rows: list[int]) -> list[float]:
            if not opened:
                opened.append(open_spec(self.spec, jnp.dtype(self.dtype)))
            images, texts = read_images([files[i] for i in rows]), [prompts[i] for i in rows]
            # The last lot is filled up, so that one compiled program serves all; a scorer on the host is not compiled.
            fill = min(BATCH, len(keys)) - len(rows) if opened[0].differentiable else 0
            scores = opened[0].score_files(images + images[-1:] * fill, texts + texts[-1:] * fill, BATCH)
            return [float(score) for score in scores[: len(rows)]]

        self.journal.fill(keys, compute, BATCH, progress)

    def collect(self, names: Sequence[str], prompts: Sequence[str]) -> tuple[np.ndarray, int]:
        """The scores ``[n]`` that any process has made, nan where there is none yet, and how many there are."""
        known = self.journal.read()
        keys = list(map(score_key, names, prompts))
        return np.array([known.get(key, np.nan) for key in keys], np.float64), sum(key in known for key in keys)

    def cut_prompts(self, prompts: Sequence[str]) -> int:
        """How many different prompts are longer than the reward reads."""
        texts = [self.spec.prompt_prefix + prompt for prompt in dict.fromkeys(prompts)]
        return 0 if self.reads is None else overlong(*self.reads, texts)

    def describe(self) -> dict[str, Any]:
        """Everything needed to open the same reward again."""
        chosen = {k: v for k, v in dataclasses.asdict(self.spec).items() if k not in _OF_THE_LOSS and v not in ("", ())}
        found = find_kind(self.spec.name, self.spec.kind, self.spec.path)
        return chosen | {"kind": found, "dtype": self.dtype, "known_as": self.known_as}


def score_key(image: str, prompt: str) -> str:
    """What the score of an image (its digest) with a prompt is kept under."""
    return key_of(image, prompt)
