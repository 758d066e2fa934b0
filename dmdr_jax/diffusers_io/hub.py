"""From the name of a model, a folder or an id on the Hugging Face hub, to a folder on this machine."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dmdr_jax.diffusers_io.components import FAMILIES, Family, read_json
from dmdr_jax.diffusers_io.safetensors_io import STEMS, has_variant
from dmdr_jax.errors import UserError

INDEX = "model_index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name: str, components: Iterable[str] | None = None, variant: str | None = None) -> Path:
    """The pipeline's folder, downloaded where ``name`` is a hub id.

    Args:
      name: a folder with a ``model_index.json``, or a hub id such as
        ``stabilityai/stable-diffusion-3-medium-diffusers``.
      components: networks to fetch; None for all of the family.
      variant: weights to prefer, such as ``"fp16"``.

    Raises:
      UserError: no such folder, or the hub does not give it.
    """
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder {name}; give a diffusers folder or a hub id such as owner/model.")
    folder = _fetch(name, [INDEX])
    family = family_of(read_json(folder / INDEX), folder)
    wanted = list(family.classes if components is None else components)
    shared = [INDEX, "scheduler/*.json", *(f"{tokenizer}/*" for tokenizer in family.tokenizers.values())]
    folder = _fetch(name, shared + weight_patterns(wanted, variant))
    # Few repositories publish a variant of every component.
    plain = [c for c in wanted if variant and not has_variant(folder / c, variant)]
    return _fetch(name, weight_patterns(plain, None)) if plain else folder


def locate_network(name: str) -> Path:
    """The folder of a single network, downloaded where ``name`` is a hub id; raises as `locate`."""
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"there is no folder {name}; give one with a config.json, or a hub id such as owner/model.")
    return _fetch(name, ["config.json", *(f"{stem}*.safetensors*" for stem in STEMS)])


def family_of(model_index: Mapping[str, object], folder: Path) -> Family:
    """The family of a ``model_index.json``; UserError if there is none for it."""
    name = model_index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"{folder} holds a {name}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[str(name)]


def weight_patterns(components: Iterable[str], variant: str | None) -> list[str]:
    """Glob patterns of the components' configs and weights, and of nothing else that a repository holds."""
    tag = f".{variant}" if variant else ""
    patterns = []
    for component in components:
        patterns.append(f"{component}/config.json")
        for stem in STEMS:
            patterns.append(f"{component}/{stem}{tag}.safetensors")
            patterns.append(f"{component}/{stem}{tag}-*.safetensors")
            patterns.append(f"{component}/{stem}.safetensors.index{tag}.json")
    return patterns


def _fetch(name: str, patterns: list[str]) -> Path:
    """Downloads files of a hub repository into the hub's cache and gives the folder of its snapshot."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    # The hub's client raises many classes: its own, those of its HTTP library, OSError and ValueError.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"there is no folder {name}, and it cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); accept its licence there and run `hf auth login`, or on a machine "
            f"with access run `hf download {name} --local-dir DIR` and give DIR."
        ) from error
