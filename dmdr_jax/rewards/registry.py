"""Opening a reward by its kind, and reading one from a command line.

    open_reward("pickscore", "PickScore_v1", tokenizer="CLIP-ViT-H-14")
    open_spec(parse_reward("hpsv21=HPS_v2.1_compressed.pt,tokenizer=tokenizer"))

`dmdr_jax.rewards.kinds.KINDS` says what each kind does with images, prompts and scores.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp

from dmdr_jax.errors import UserError
from dmdr_jax.rewards.base import Reward, RewardSpec
from dmdr_jax.rewards.kinds import AESTHETIC, CLIP, IMAGE_REWARD, KINDS, PYTHON, Kind, find_kind, is_function

OPTIONS = ("kind", "tokenizer", "backbone", "arch", "activation", "resize", "prompt_prefix")
"""What `parse_reward` takes behind the path: fields of `RewardSpec`."""

_OPTION = re.compile(rf",({'|'.join(OPTIONS)})=")


def open_reward(
    kind: str, path: str, *, name: str = "", dtype: Any = jnp.float32, remat: bool = False, **fields
) -> Reward:
    """Opens a reward.

    Args:
      kind: a name of `KINDS`, in any usual spelling ("hps", "HPSv2.1").
      path: folder or file; "package.module:function" or "file.py:function" for the kind "python".
      name: in metrics and tables; the kind's by default.
      dtype: of the towers; heads and scores are fp32 in any case.
      remat: recompute the towers' layers in the backward pass.
      fields: others of `RewardSpec`, such as tokenizer, backbone, activation, prompt_prefix.

    Raises:
      UserError: no such kind, or nothing of that kind at the path.
    """
    return open_spec(RewardSpec(name or kind, path, kind=kind, **fields), dtype, remat)


def open_spec(spec: RewardSpec, dtype: Any = jnp.float32, remat: bool = False) -> Reward:
    """Opens the reward that a spec describes; the kind is inferred from name and path where it does not say one.

    Raises:
      UserError: no such kind, or nothing of that kind at the path.
    """
    if not spec.path:
        raise UserError(f"Reward {spec.name!r} has no path: give the folder or file of its weights.")
    kind = find_kind(spec.name, spec.kind, spec.path)
    return _loader(KINDS[kind].network)(dataclasses.replace(spec, kind=kind), dtype, remat)


def kind_of(reward: Reward) -> Kind:
    """What kind an opened reward is of: how tables show it, whether it reads prompts."""
    return KINDS[find_kind(reward.spec.name, reward.spec.kind, reward.spec.path)]


def parse_reward(text: str, resolve: Callable[[str], str] = lambda path: path) -> RewardSpec:
    """The spec of "NAME=PATH" or "PATH", with options behind it: "NAME=PATH,tokenizer=FOLDER,kind=hps".

    Args:
      text: NAME is the reward's name and, if it is a kind's, its kind; without it the path's last part is the name.
      resolve: makes a path of what stands for one, such as "shapes:rewards/shapes_clip".

    Raises:
      UserError: there is no path.
    """
    parts = _OPTION.split(text)
    head, options = parts[0], cast(dict[str, Any], dict(zip(parts[1::2], parts[2::2])))
    name, equals, path = head.partition("=")
    if not equals:
        name, path = "", head
    if not path or (equals and not name):
        raise UserError(f"a reward is written NAME=PATH (and ,tokenizer=FOLDER and the like behind it), not {text!r}.")
    path = resolve(path)
    return RewardSpec(name or _last_part(path), path, **options)


def _last_part(path: str) -> str:
    return path.rpartition(":")[2] if is_function(path) else path.rstrip("/").rpartition("/")[2]


def _loader(network: str) -> Callable[[RewardSpec, Any, bool], Reward]:
    """The function that reads a kind of network; imported here, so that a run loads the code of its own rewards."""
    if network == CLIP:
        from dmdr_jax.rewards.clip_reward import load_clip_reward

        return load_clip_reward
    if network == AESTHETIC:
        from dmdr_jax.rewards.aesthetic import load_aesthetic_reward

        return load_aesthetic_reward
    if network == IMAGE_REWARD:
        from dmdr_jax.rewards.image_reward import load_image_reward

        return load_image_reward
    assert network == PYTHON, network
    from dmdr_jax.rewards.python_reward import load_python_reward

    return lambda spec, dtype, remat: load_python_reward(spec)
