"""Everything that is measured on the images of an evaluation, kept image by image, and then taken together.

Per image: the rewards, how the image looks, and its distance to the other images of its prompt. Of the whole set:
distances to the first model's images and to those of `References`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation.appearance import MEASURES, appearance
from dmdr_jax.evaluation.contestants import Contestant
from dmdr_jax.evaluation.distances import Gaussian, KernelReference, frechet_distance, precision_recall, unit_rows
from dmdr_jax.evaluation.features import CMMD, FRECHET, PRECISION, RECALL, FeatureStore, parse_features
from dmdr_jax.evaluation.images import digests, image_files, read_images
from dmdr_jax.evaluation.journal import Journal, key_of
from dmdr_jax.evaluation.lpips import Lpips, load_lpips
from dmdr_jax.evaluation.results import Measured
from dmdr_jax.evaluation.scorers import Scorer, fingerprint, parse_rewards
from dmdr_jax.evaluation.shards import OthersAtWork, Shard
from dmdr_jax.evaluation.table import Statistic

LOT = 64  # images whose appearance is measured between two lines of the journal
FEWEST = 8  # images that a distance is measured of
STATISTICS = ".npz"  # a reference that is FID's mean and covariance, not images
DIVERSITY = "lpips"
TEACHER = "teacher"
"""The reference that the first model's images are."""


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is measured, and where it is kept.

    Attributes:
      rewards: the scorers.
      features: networks for distances between sets.
      references: folders of images (or a file of statistics) by name.
      lpips: of the images of one prompt; None: not measured.
      per_prompt: images of each prompt.
      work: folder of the journals.
    """

    rewards: list[Scorer]
    features: list[FeatureStore]
    references: dict[str, str]
    lpips: Lpips | None
    per_prompt: int
    work: Path
    shard: Shard

    @classmethod
    def make(cls, args: Any, images: int, per_prompt: int, work: Path, shard: Shard) -> "Measures":
        """Opens everything that the command line names once, so that a mistake shows before anything long begins.

        Args:
          images: of each model.

        Raises:
          UserError: something cannot be read, or there are too few images for a distance.
        """
        specs = parse_rewards([*_paths(args.rewards), *_paths(args.judge), *(args.reward or ())])
        features = [parse_features(text) for text in args.features or ()]
        names = [spec.name for spec in features]
        if len(set(names)) < len(names):
            raise UserError("two of --features have one name: give each its own.")
        if args.reference and not features:
            raise UserError("--reference without --features measures nothing: give --features NAME=PATH.")
        references = dict(_reference(text) for text in args.reference or ())
        if features and images < FEWEST:
            raise UserError(f"--features needs at least {FEWEST} images of each model, not {images}.")
        return cls(
            [Scorer.make(spec, args.reward_dtype, work, shard.index) for spec in specs],
            [FeatureStore.make(spec, work) for spec in features],
            references,
            _open_lpips(args.lpips, per_prompt),
            per_prompt,
            work,
            shard,
        )

    def __bool__(self) -> bool:
        return bool(self.rewards or self.features or self.lpips)

    # --- image by image ------------------------------------------------------------------------------------------

    def fill(self, contestants: Sequence[Contestant], prompts: Sequence[str]) -> None:
        """Measures this process's part of the models' images; each network is opened once, one after the other."""
        rows = self.shard.rows(len(prompts))
        files = [contestant.gallery.files[i] for contestant in contestants for i in rows]
        texts, names = [prompts[i] for i in rows] * len(contestants), digests(files)
        for scorer in self.rewards:
            with _bar(scorer.spec.name, files) as bar:
                scorer.score(files, names, texts, bar.update)
        for store in self.features:
            with _bar(store.spec.name, files) as bar:
                store.fill(files, names, bar.update)
        self._looks.fill(names, lambda some: [appearance(i) for i in read_images([files[j] for j in some])], LOT)

    def fill_references(self) -> None:
        """Computes the features of this process's part of the references' images."""
        for name, place in self.references.items():
            files = [] if place.endswith(STATISTICS) else image_files(place)
            own = [files[i] for i in self.shard.rows(len(files))]
            names = digests(own)
            for store in self.features:
                with _bar(f"{name}, {store.spec.name}", own) as bar:
                    store.fill(own, names, bar.update)

    def fill_prompts(self, contestants: Sequence[Contestant], shard: Shard) -> None:
        """Measures, for a part of the prompts, how the images of a prompt differ; all images are there."""
        for contestant in contestants if self.lpips else ():
            groups = self._groups(contestant.gallery.files)
            own = [groups[i] for i in shard.rows(len(groups))]
            with _bar(f"{contestant.name}, LPIPS", own) as bar:
                self._spread.fill(list(map(self._group_key, own)), lambda some: self._spreads(own, some), 1, bar.update)

    def _spreads(self, groups: Sequence[Sequence[Path]], some: Sequence[int]) -> list[list[float]]:
        return [self.lpips.spread(read_images(groups[i])).tolist() for i in some]

    # --- taken together ------------------------------------------------------------------------------------------

    def collect(self, contestant: Contestant, prompts: Sequence[str], keys: Mapping[str, str]) -> Measured:
        """All that is measured of a model, distances to sets aside.

        Args:
          keys: of the rewards in the results, by name.

        Raises:
          OthersAtWork: something is missing.
        """
        names = digests(contestant.gallery.files)
        per_image = {keys[s.spec.name]: _whole(s.spec.name, *s.collect(names, prompts)) for s in self.rewards}
        looks = self._looks.read()
        _whole("appearances", looks, sum(name in looks for name in names), len(names))
        per_image |= {m: np.array([looks[name][m] for name in names]) for m in MEASURES}
        if self.lpips:
            known, groups = self._spread.read(), list(map(self._group_key, self._groups(contestant.gallery.files)))
            _whole("LPIPS of prompts", known, sum(g in known for g in groups), len(groups))
            per_image[DIVERSITY] = np.concatenate([known[g] for g in groups])
        return Measured(per_image, {})

    def distances(self, contestants: Sequence[Contestant]) -> dict[str, dict[str, Statistic]]:
        """Statistics of sets of each model's images, by model and key such as ``frechet/inception/coco``.

        The first model is not compared with itself.
        """
        found: dict[str, dict[str, Statistic]] = {contestant.name: {} for contestant in contestants}
        for store in self.features:
            own = {c.name: self._features(store, c.gallery.files, c.name) for c in contestants}
            references: dict[str, np.ndarray | Gaussian] = {TEACHER: own[contestants[0].name]}
            references |= {name: self._reference_features(store, name) for name in self.references}
            for name, reference in references.items():
                measures = _against(reference, store.spec.measures)
                for contestant in contestants[name == TEACHER :]:
                    for measure, f in measures.items():
                        key = f"{measure}/{store.spec.name}/{name}"
                        found[contestant.name][key] = _on(own[contestant.name], f)
        return found

    def _features(self, store: FeatureStore, files: Sequence[Path], who: str) -> np.ndarray:
        names = digests(files)
        return _whole(f"features of {who}", *store.collect(names), len(names))

    def _reference_features(self, store: FeatureStore, name: str) -> "np.ndarray | Gaussian":
        place = self.references[name]
        return Gaussian.read(place) if place.endswith(STATISTICS) else self._features(store, image_files(place), name)

    @functools.cached_property
    def _looks(self) -> Journal:
        return Journal(self.work / "appearance", self.shard.index)

    @functools.cached_property
    def _spread(self) -> Journal:
        return Journal(self.work / DIVERSITY, self.shard.index)

    @functools.cached_property
    def _lpips_is(self) -> str:
        return fingerprint([self.lpips.params, self.lpips.weights])

    def _group_key(self, files: Sequence[Path]) -> str:
        return key_of(self._lpips_is, digests(files))

    def _groups(self, files: Sequence[Path]) -> list[Sequence[Path]]:
        """The images of each prompt."""
        return [files[i : i + self.per_prompt] for i in range(0, len(files), self.per_prompt)]

    def describe(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What the results say of the measures."""
        return {
            "rewards": {s.spec.name: s.describe() | {"cut_prompts": s.cut_prompts(prompts)} for s in self.rewards},
            "features": {s.spec.name: dataclasses.asdict(s.spec) | {"known_as": s.folder.name} for s in self.features},
            "references": self.references,
            "lpips": self.lpips and self._lpips_is,
        }


# --- the command line ----------------------------------------------------------------------------------------------


def _paths(text: str | None) -> list[str]:
    return [] if text in (None, "none") else text.split(",")


def _reference(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not equals or not name or not place or name == TEACHER:
        raise UserError(f"--reference {text!r} is not NAME=FOLDER with a NAME other than {TEACHER!r}.")
    if place.endswith(STATISTICS):
        Gaussian.read(place)
    elif len(image_files(place)) < FEWEST:
        raise UserError(f"--reference {name}: {place} must hold at least {FEWEST} images.")
    return name, place


def _open_lpips(text: str | None, per_prompt: int) -> Lpips | None:
    if text is None:
        return None
    trunk, _, linear = text.partition(",")
    if not linear:
        raise UserError("--lpips takes two files, TRUNK,LINEAR: torchvision's VGG-16 or AlexNet, and lpips' own.")
    if per_prompt < 2:
        raise UserError("--lpips measures how the images of one prompt differ: give --per_prompt 2 or more.")
    return load_lpips(trunk, linear)


def _bar(what: str, items: Sequence[Any]) -> tqdm:
    return tqdm(total=len(items), desc=what, unit="image")


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _whole(what: str, values: Any, there: int, total: int | None = None) -> Any:
    """``values`` where all of them are there; OthersAtWork while some are missing."""
    total = len(values) if total is None else total
    if there < total:
        raise OthersAtWork(what, there, total)
    return values


def _against(reference: "np.ndarray | Gaussian", measures: Sequence[str]) -> dict[str, Callable[[np.ndarray], float]]:
    """Functions of features, one for each measure that the reference allows."""
    found: dict[str, Callable[[np.ndarray], float]] = {}
    gaussian = reference if isinstance(reference, Gaussian) else Gaussian.fit(reference)
    if FRECHET in measures:
        found[FRECHET] = lambda features: frechet_distance(features, gaussian)
    if isinstance(reference, Gaussian):
        return found
    if CMMD in measures:
        kernel = KernelReference(unit_rows(reference))
        found[CMMD] = lambda features: kernel.mmd(unit_rows(features))
    for i, name in enumerate((PRECISION, RECALL)):
        if name in measures:
            found[name] = _on_manifold(reference, i)
    return found


def _on_manifold(reference: np.ndarray, i: int) -> Callable[[np.ndarray], float]:
    """Precision (0) or recall (1)."""
    return lambda features: precision_recall(features, reference)[i]


def _on(features: np.ndarray, f: Callable[[np.ndarray], float]) -> Statistic:
    """``f`` of some of the images; remembered, as every comparison asks for the same few."""
    known: dict[bytes, float] = {}

    def statistic(index: np.ndarray) -> float:
        key = index.tobytes()
        if key not in known:
            known[key] = f(features[index])
        return known[key]

    return statistic
