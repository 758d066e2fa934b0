"""A reward of one's own: one Python function `score(images, prompts) -> [b]`, named in the configuration.

    config.rewards.sharp = base.reward("my_rewards.py:sharpness", weight=0.1)      # or "package.module:function"

**Written in JAX**, it has a gradient and serves every method:

    def sharpness(images, prompts):                      # images [b, h, w, 3] in [0, 1], fp32
        return jnp.abs(jnp.diff(images, axis=1)).mean((1, 2, 3))

Training compiles the function, and a compiled program has no strings. One that reads its prompts turns them into
numbers first, outside, and gets those in the place of the prompts:

    def count_colours(prompts): return np.array([[p.count("red"), p.count("blue")] for p in prompts], np.float32)

    @text_encoder(count_colours)
    def colourful(images, wanted): ...                   # wanted [b, 2]

**Anything else** (PyTorch, an HTTP judge) is marked as living on the host. It gets numpy images and real strings,
has no gradient, and serves evaluation and the methods that only compare scores:

    @host_scorer
    def judge(images, prompts): return [ask(image, prompt) for image, prompt in zip(images, prompts)]

A function that JAX cannot trace is taken for such a one, marked or not; gradient methods refuse it and say why.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Params, RewardSpec, clamp_images, refuse_contrast, why_no_gradient
from dmdr_jax.rewards.scoring import slices

Array = jax.Array
Scorer = Callable[..., Any]

_ENCODER, _ON_HOST = "text_encoder", "on_host"
_BYTES = 1024
# Shapes that a scorer is tried with; one that takes images of a certain size alone may take the other.
_PROBES = ((2, 256, 256, 3), (2, 32, 32, 3))


def host_scorer(function: Scorer) -> Scorer:
    """Marks a scorer that runs on the host: `(numpy images [b, h, w, 3] in [0, 1], list of b strings) -> b numbers`."""
    setattr(function, _ON_HOST, True)
    return function


def text_encoder(encode: Callable[[Sequence[str]], np.ndarray]) -> Callable[[Scorer], Scorer]:
    """Gives a JAX scorer what ``encode(prompts)`` makes of its prompts, an array `[b, ...]`, in their place."""

    def mark(function: Scorer) -> Scorer:
        setattr(function, _ENCODER, encode)
        return function

    return mark


class TracedPrompts:
    """What a JAX scorer gets for its prompts inside a compiled program: their number, and an error for the rest."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def _refuse(self, *_: Any) -> Any:
        raise PromptsUnavailable(
            "it reads its prompts, which are no strings inside a compiled program: give it a text_encoder"
        )

    __iter__ = __getitem__ = __contains__ = _refuse


class PromptsUnavailable(TypeError):
    """A compiled scorer has asked for a prompt's text."""


@dataclasses.dataclass(frozen=True, eq=False)
class PythonReward:
    """A `dmdr_jax.rewards.base.Reward` around a user's function; made by `load_python_reward`.

    Attributes:
      function: the user's.
      differentiable: whether JAX can trace it.
      reason: why not.
      params: none.
    """

    spec: RewardSpec
    function: Scorer
    differentiable: bool
    reason: str = ""
    params: Params = dataclasses.field(default_factory=dict)

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """What the function's encoder makes of the prompts, `[b, ...]`; for a host scorer their bytes `[b, 1024]`."""
        texts = self._texts(prompts)
        if not self.differentiable:
            return to_bytes(texts)
        return np.zeros((len(texts), 1), np.int32) if self._encode is None else self._encoded(texts)

    def text_features(self, ids: Array | np.ndarray) -> Array:
        """The same."""
        return jnp.asarray(ids)

    def prompt_features(self, prompts: Sequence[str], place: Callable[[np.ndarray], Array] = jnp.asarray) -> np.ndarray:
        """The same, on the host."""
        return self.tokenize(prompts)

    def score(self, params: Params, images: Array, text_features: Array) -> Array:
        """Scores `[b]`, fp32, of images `[b, h, w, 3]` in [0, 1] (clamped).

        A host scorer is called back from the compiled program; for one call with the whole batch and without its
        limits on several hosts, use `score_prompts`.

        Raises:
          UserError: a gradient is asked of a host scorer, or the result is not `[b]`.
        """
        images = clamp_images(images.astype(jnp.float32))
        text_features = jax.lax.stop_gradient(text_features)
        if not self.differentiable:
            return self._call_back(images, text_features)
        prompts = TracedPrompts(len(images)) if self._encode is None else text_features
        scores = self.function(images, prompts)
        if jnp.shape(scores) != (len(images),):
            raise UserError(f"{self._who} gave scores of shape {jnp.shape(scores)} for {len(images)} images.")
        return jnp.asarray(scores, jnp.float32)

    def score_prompts(self, images: np.ndarray, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of images `[n, h, w, 3]` in [0, 1] with their prompts, batch by batch, called directly."""
        texts = self._texts(prompts)
        found = [self._evaluate(np.asarray(images[rows]), texts[rows]) for rows in slices(len(texts), batch)]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    def score_files(self, images: Sequence[np.ndarray], prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """Scores `[n]` of uint8 images of any sizes, one by one."""
        found = [self.score_prompts(image[None] / np.float32(255), [p]) for image, p in zip(images, prompts)]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    @property
    def _encode(self) -> Callable | None:
        return getattr(self.function, _ENCODER, None)

    @property
    def _who(self) -> str:
        return f"Reward {self.spec.name!r}: {self.spec.path}"

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        return [self.spec.prompt_prefix + prompt for prompt in prompts]

    def _encoded(self, texts: list[str]) -> np.ndarray:
        encoded = np.asarray(self._encode(texts))  # type: ignore[misc]
        if encoded.shape[:1] != (len(texts),):
            raise UserError(f"{self._who}: its text_encoder gave the shape {encoded.shape} for {len(texts)} prompts.")
        return encoded

    def _evaluate(self, images: np.ndarray, texts: list[str]) -> np.ndarray:
        """The function's scores `[b]`, called directly; texts have their prefix."""
        images = np.clip(np.asarray(images, np.float32), 0.0, 1.0)
        if self.differentiable:
            given = texts if self._encode is None else self._encoded(texts)
            scores = np.asarray(self.function(jnp.asarray(images), given), np.float32)
        else:
            scores = np.asarray(self.function(images, texts), np.float32)
        if scores.shape != (len(texts),):
            raise UserError(f"{self._who} gave scores of shape {scores.shape} for {len(texts)} images.")
        return scores

    def _call_back(self, images: Array, features: Array) -> Array:
        shape = jax.ShapeDtypeStruct((len(images),), jnp.float32)

        @jax.custom_jvp
        def scored(images: Array, features: Array) -> Array:
            def on_host(images: Any, features: Any) -> np.ndarray:
                return self._evaluate(np.asarray(images), from_bytes(np.asarray(features)))

            return jax.pure_callback(on_host, shape, images, features)

        @scored.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            raise UserError(f"Reward {self.spec.name!r} has no gradient{why_no_gradient(self)}; write it in JAX.")

        return scored(images, features)


def load_python_reward(spec: RewardSpec) -> PythonReward:
    """Finds the function that `spec.path` names, "package.module:function" or "file.py:function".

    Raises:
      UserError: there is no such module, file or function, importing it fails, or its result is not `[b]`.
    """
    refuse_contrast(spec)
    who = f"Reward {spec.name!r}"
    module_name, _, name = spec.path.rpartition(":")
    if not module_name:
        raise UserError(f"{who}: {spec.path!r} names no function; write package.module:function or file.py:function.")
    module = _import(module_name, who)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [value for _, value in inspect.getmembers(module, inspect.isfunction)]
        named = [f.__name__ for f in functions if f.__module__ == module.__name__ and not f.__name__.startswith("_")]
        raise UserError(f"{who}: {module_name} has no function {name!r}; it has {', '.join(named) or 'none'}.")
    reason = "it is marked as a host_scorer" if getattr(function, _ON_HOST, False) else ""
    reward = PythonReward(spec, function, not reason, reason)
    return reward if reason else _probed(reward)


def _probed(reward: PythonReward) -> PythonReward:
    """The reward as it is if JAX can trace its function, else as a host scorer with the reason."""
    ids = reward.tokenize([""] * _PROBES[0][0])
    features = jax.ShapeDtypeStruct(ids.shape, ids.dtype)
    errors: list[Exception] = []
    for shape in _PROBES:
        try:
            jax.eval_shape(partial(reward.score, {}), jax.ShapeDtypeStruct(shape, jnp.float32), features)
            return reward
        except Exception as error:  # whatever the user's function, or PyTorch given a tracer, raises
            errors.append(error)
    wrong = next((error for error in errors if isinstance(error, UserError)), None)
    if wrong is not None:
        raise wrong
    return dataclasses.replace(reward, differentiable=False, reason=_reason(errors[0]))


def _reason(error: Exception) -> str:
    if isinstance(error, PromptsUnavailable):
        return str(error)
    message = str(error).splitlines()[:1] or [""]
    return f"JAX cannot trace it: {type(error).__name__}: {message[0]}"


def _import(name: str, who: str) -> Any:
    """A module by its name, or from a file."""
    try:
        if not name.endswith(".py"):
            sys.path.insert(0, "")  # modules of the current folder, as `python -m` has them
            try:
                return importlib.import_module(name)
            finally:
                sys.path.remove("")
        file = Path(name).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"{who}: there is no file {name}.")
        spec = importlib.util.spec_from_file_location(f"dmdr_reward_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return module
    except UserError:
        raise
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{who}: {name} cannot be imported ({type(error).__name__}: {error}).") from error


def to_bytes(texts: Sequence[str]) -> np.ndarray:
    """Texts as UTF-8, uint8 `[b, 1024]`, filled up with zeros; a longer one is cut between characters."""
    rows = np.zeros((len(texts), _BYTES), np.uint8)
    for row, text in zip(rows, texts):
        encoded = text.encode("utf-8")[:_BYTES].decode("utf-8", "ignore").encode("utf-8")
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return rows


def from_bytes(rows: np.ndarray) -> list[str]:
    """The texts of `to_bytes`."""
    return [row.tobytes().rstrip(b"\0").decode("utf-8") for row in rows]
