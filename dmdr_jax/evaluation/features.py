"""Features of images, for distances between sets of them: whose they are, and the store they are kept in.

    inception   Inception-v3 of FID; Frechet distance, precision, recall
    clip        CLIP's image features (for CMMD: ViT-L/14 at 336 pixels); CMMD and Frechet distance
    function    ``file.py:function`` or ``package.module:function`` of one's own, from a list of uint8 images to
                ``[n, d]``; Frechet distance, precision, recall

A feature is a function of the network and the image's bytes, and is kept under these two.
"""

import dataclasses
import os
import pkgutil
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.evaluation import inception
from dmdr_jax.evaluation.images import read_images
from dmdr_jax.evaluation.journal import key_of
from dmdr_jax.evaluation.scorers import fingerprint, source_of
from dmdr_jax.rewards.base import RewardSpec
from dmdr_jax.rewards.clip_files import open_clip_file
from dmdr_jax.rewards.clip_reward import preprocessing_of, read_params, towers
from dmdr_jax.rewards.kinds import KINDS as REWARD_KINDS
from dmdr_jax.rewards.kinds import is_function
from dmdr_jax.shapes.assets import resolve

LOT = 64  # images whose features are computed between two files of the store
BATCH = 16

Images = Sequence[np.ndarray]
FRECHET, CMMD, PRECISION, RECALL = "frechet", "cmmd", "precision", "recall"


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Something that gives features.

    Attributes:
      embed: uint8 images of any sizes to ``[n, d]`` float32.
      known_as: what it is known by.
    """

    embed: Callable[[Images], np.ndarray]
    known_as: str


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What ``--features NAME=PATH[,resize=R]`` asks for.

    Attributes:
      kind: "inception", "clip" or "function".
      resize: of Inception's input, see `dmdr_jax.evaluation.inception`.
    """

    name: str
    kind: str
    path: str
    resize: str = "clean"

    @property
    def measures(self) -> tuple[str, ...]:
        """The distances that are usual with these features."""
        return (FRECHET, CMMD) if self.kind == "clip" else (FRECHET, PRECISION, RECALL)


def parse_features(text: str) -> FeatureSpec:
    """Reads ``NAME=PATH[,resize=R]``; the kind is the beginning of the name, unless the path is a function.

    Raises:
      UserError: it is malformed or of no known kind.
    """
    name, equals, rest = text.partition("=")
    path, *options = rest.split(",")
    path = resolve(path)
    if not equals or not name or not path:
        raise UserError(f"--features {text!r} is not NAME=PATH, such as inception=FILE or clip=FOLDER.")
    fields = dict(option.partition("=")[::2] for option in options)
    if set(fields) - {"resize"} or fields.get("resize", "clean") not in inception.RESIZES:
        raise UserError(f"--features {text!r}: behind the path only resize=clean or resize=pytorch may stand.")
    if is_function(path):
        return FeatureSpec(name, "function", path)
    kind = next((kind for kind in ("inception", "clip") if name.lower().startswith(kind)), None)
    if kind is None:
        raise UserError(f"--features {text!r}: begin the name with inception or clip, or give file.py:function.")
    return FeatureSpec(name, kind, path, **fields)


def open_network(spec: FeatureSpec) -> Network:
    """Opens what a spec names; UserError where it cannot be read."""
    return {"inception": _open_inception, "clip": _open_clip, "function": _open_function}[spec.kind](spec)


def _open_inception(spec: FeatureSpec) -> Network:
    params = inception.load_inception(spec.path)
    apply = jax.jit(lambda params, x: inception.Inception().apply({"params": params}, x))

    def embed(images: Images) -> np.ndarray:
        return _in_batches(lambda some: apply(params, inception.to_input(some, spec.resize)), images)

    return Network(embed, key_of("inception", fingerprint(params), spec.resize))


def _open_clip(spec: FeatureSpec) -> Network:
    """CLIP's projected features, not normalised; the picture is cut to a square before it is resized, as CMMD does."""
    file = open_clip_file(Path(spec.path).expanduser())
    params = read_params(file, jnp.float32, image_side_only=True)
    vision, _ = towers(file.config, jnp.float32)
    preprocess = preprocessing_of(RewardSpec(spec.name, resize="squash"), REWARD_KINDS["clip"], file)

    @jax.jit
    def apply(params: Any, pixels: Any) -> Any:
        tower: Any = vision.apply({"params": params}, pixels)
        return tower.projected

    def embed(images: Images) -> np.ndarray:
        return _in_batches(lambda some: apply(params, preprocess.published([centre(i) for i in some])), images)

    return Network(embed, key_of("clip", fingerprint(params), str(preprocess)))


def _open_function(spec: FeatureSpec) -> Network:
    function = find_function(spec.path)

    def embed(images: Images) -> np.ndarray:
        found = np.asarray(function(list(images)), np.float32)
        if found.ndim != 2 or len(found) != len(images):
            raise UserError(f"{spec.path} gave features of shape {found.shape} for {len(images)} images, not [n, d].")
        return found

    return Network(embed, key_of("function", spec.path, source_of(function)))


def find_function(path: str) -> Callable[[Images], Any]:
    """The function of ``file.py:function`` or ``package.module:function``; UserError where there is none."""
    module, _, name = path.rpartition(":")
    try:
        function = runpy.run_path(module)[name] if module.endswith(".py") else pkgutil.resolve_name(path)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"--features: there is no function {path} ({type(error).__name__}: {error}).") from error
    if not callable(function):
        raise UserError(f"--features: {path} is no function.")
    return function


def centre(image: np.ndarray) -> np.ndarray:
    """The largest square in the middle of a picture ``[h, w, 3]``."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _in_batches(apply: Callable[[list[np.ndarray]], Any], images: Images) -> np.ndarray:
    found = []
    for start in range(0, len(images), BATCH):
        some = list(images[start : start + BATCH])
        filled = some + some[-1:] * (BATCH - len(some))  # one compiled program serves all
        found.append(np.asarray(apply(filled), np.float32)[: len(some)])
    return np.concatenate(found)


# --- the store -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """Features by image, in files of some images each, which several processes write at a time.

    Attributes:
      spec: the network, opened when features are missing.
      folder: of the files.
    """

    spec: FeatureSpec
    folder: Path

    @classmethod
    def make(cls, spec: FeatureSpec, work: Path) -> "FeatureStore":
        """Opens the network once, so that a mistake shows before anything long begins."""
        return cls(spec, work / f"{spec.name}-{open_network(spec).known_as[:10]}")

    def fill(self, files: Sequence[Path], names: Sequence[str], progress: Callable[[int], Any]) -> None:
        """Computes the features of images that have none yet.

        Args:
          names: digests of the files.
          progress: called with the number of images done, those known from before at once.
        """
        known = self._read()
        missing = [i for i, name in enumerate(names) if name not in known]
        progress(len(names) - len(missing))
        if not missing:
            return
        network = open_network(self.spec)
        for start in range(0, len(missing), LOT):
            rows = missing[start : start + LOT]
            self._add([names[i] for i in rows], network.embed(read_images([files[i] for i in rows])))
            progress(len(rows))

    def collect(self, names: Sequence[str]) -> tuple[np.ndarray, int]:
        """Features ``[n, d]`` of those images that have some, in their order, and how many these are."""
        known = self._read()
        found = [known[name] for name in names if name in known]
        return np.stack(found) if found else np.zeros((0, 0), np.float32), len(found)

    def _read(self) -> Mapping[str, np.ndarray]:
        known: dict[str, np.ndarray] = {}
        for file in self.folder.glob("*.npz"):
            with np.load(file, allow_pickle=False) as stored:
                known |= zip(stored["names"].tolist(), stored["features"])
        return known

    def _add(self, names: Sequence[str], features: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{key_of(list(names))}.npz"
        partial = self.folder / f".{file.name}.{os.getpid()}"
        with open(partial, "wb") as stream:
            np.savez(stream, names=np.array(names), features=features)
        partial.replace(file)
