"""From the name of a model to a folder on this machine: a folder, a URL, or an id on the Hugging Face hub.

Of a repository only what is needed is fetched: first the small files, and then, as these say, the weight files of one
variant. The hub's client keeps them in its cache, takes up interrupted downloads and shows its progress.
"""

import functools
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dmdr_jax.diffusers_io import lora_file, remote
from dmdr_jax.diffusers_io.components import FAMILIES, Family, read_json
from dmdr_jax.diffusers_io.safetensors_io import STEMS, has_variant, index_names, single_name
from dmdr_jax.errors import UserError

INDEX = "model_index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LIBRARY_STEMS = {"diffusers": STEMS[0], "transformers": STEMS[1]}
_SITE = "https://huggingface.co"

Fetch = Callable[[Sequence[str]], Path]


def locate(name: str, components: Iterable[str] | None = None, variant: str | None = None) -> Path:
    """The pipeline's folder, copied to this machine where it is not on it.

    Args:
      name: a folder with a ``model_index.json``; a URL of one, such as ``gs://bucket/model``; or a hub id such as
        ``stabilityai/stable-diffusion-3-medium-diffusers``.
      components: networks whose weights to fetch; None for all of the family.
      variant: weights to prefer, such as ``"fp16"``.

    Raises:
      UserError: no such folder, or it cannot be fetched.
    """
    chosen = None if components is None else list(components)
    source = _source(name, needed(_known_family(name), chosen, variant))
    if isinstance(source, Path):
        return source
    family = _fetch_family(name, source)
    wanted = list(family.classes) if chosen is None else chosen
    folder = source(small_files(family))
    folder = source(weight_files_wanted(folder, wanted, variant))
    # Few repositories publish a variant of every component.
    plain = [c for c in wanted if variant and not has_variant(folder / c, variant)]
    return source(weight_files_wanted(folder, plain, None)) if plain else folder


def locate_configs(name: str) -> Path:
    """A pipeline's folder, of another place than this machine the configurations alone; raises as `locate`."""
    source = _source(name, [INDEX, "*/*.json"])
    if isinstance(source, Path):
        return source
    return source(small_files(_fetch_family(name, source)))


def locate_network(name: str, also: Sequence[str] = ()) -> Path:
    """The folder of a single network, or a weight file; raises as `locate`.

    Args:
      name: as for `locate`.
      also: patterns of more files to fetch, such as a tokenizer's.
    """
    source = _source(name, ["*.json", *(f"{stem}*.safetensors" for stem in STEMS), *also])
    if isinstance(source, Path):
        return source
    folder = source(["*.json", *also])
    return source(weight_files_wanted(folder, [""], None))


def locate_lora(name: str) -> Path:
    """The folder or file of a LoRA; raises as `locate`, but not for a file that is not there."""
    patterns = [*lora_file.FILE_NAMES, lora_file.CONFIG_NAME]
    if name.endswith(".safetensors") and not remote.is_url(name):
        return Path(name)
    if remote.is_url(name) and name.endswith(".safetensors"):
        folder, _, file = name.rpartition("/")
        return remote.fetch(folder, [file, lora_file.CONFIG_NAME]) / file
    source = _source(name, patterns)
    return source if isinstance(source, Path) else source(patterns)


def family_of(model_index: Mapping[str, object], folder: Path) -> Family:
    """The family of a ``model_index.json``; UserError if there is none for it."""
    name = model_index.get("_class_name")
    if name not in FAMILIES:
        raise UserError(f"{folder} holds a {name}; supported are {', '.join(FAMILIES)}.")
    return FAMILIES[str(name)]


def small_files(family: Family) -> list[str]:
    """Patterns of all that a pipeline has beside weights: configurations, indices of shards, tokenizers."""
    return [
        INDEX,
        "scheduler/*.json",
        *(f"{component}/*.json" for component in family.classes),
        *(f"{tokenizer}/*" for tokenizer in family.tokenizers.values()),
    ]


def weight_files_wanted(folder: Path, components: Iterable[str], variant: str | None) -> list[str]:
    """Names of the weight files of one variant, below a folder whose indices are there already.

    A component without an index is one file; which of the two libraries names it is not known, so both names are given.
    """
    names = []
    for component in components:
        for stem in STEMS:
            indices = [folder / component / name for name in index_names(stem, variant)]
            index = next((file for file in indices if file.is_file()), None)
            shards = set(read_json(index).get("weight_map", {}).values()) if index else {single_name(stem, variant)}
            names += [f"{component}/{shard}".lstrip("/") for shard in sorted(shards)]
    return names


def needed(family: Family | None, components: Iterable[str] | None, variant: str | None) -> list[str]:
    """Patterns of everything that `locate` may ask for, for whoever must fetch it by hand."""
    patterns = [INDEX, "*/*.json", "tokenizer*/*"]
    stems: dict[str, Iterable[str]] = (
        {"*": _LIBRARY_STEMS.values()} if components is None else dict.fromkeys(components, STEMS)
    )
    if family is not None:
        libraries = {name: library for name, (library, _) in family.classes.items()}
        stems = {c: (_LIBRARY_STEMS[libraries[c]],) for c in components or libraries if c in libraries}
    for component, names in stems.items():
        for stem in names:
            for tag in dict.fromkeys((f".{variant}" if variant else "", "")):
                patterns += [f"{component}/{stem}{tag}.safetensors", f"{component}/{stem}{tag}-*.safetensors"]
    return patterns


def _source(name: str, patterns: Sequence[str]) -> Path | Fetch:
    """The folder itself, or how to fetch files of it."""
    if remote.is_url(name):
        return functools.partial(remote.fetch, name)
    folder = Path(name).expanduser()
    if folder.exists():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            f"there is no folder {name}; give a diffusers folder, a URL such as gs://bucket/model, or a hub id such as "
            "owner/model."
        )
    return functools.partial(_fetch, name, patterns)


def _known_family(name: str) -> Family | None:
    """The family of a published model, for advice before anything could be fetched."""
    from dmdr_jax.diffusers_io.published import published_models

    known = published_models().get(name)
    return FAMILIES[known["model_index"]["_class_name"]] if known else None


def _fetch_family(name: str, source: Fetch) -> Family:
    folder = source([INDEX])
    if not (folder / INDEX).is_file():
        raise UserError(f"{name} is not a diffusers pipeline: it has no {INDEX}.")
    return family_of(read_json(folder / INDEX), Path(name))


def _fetch(name: str, all_needed: Sequence[str], patterns: Sequence[str]) -> Path:
    """Downloads files of a hub repository into the hub's cache and gives the folder of its snapshot."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    # The hub's client raises many classes: its own, those of its HTTP library, OSError and ValueError.
    except Exception as error:
        includes = " ".join(f"--include {shlex.quote(pattern)}" for pattern in all_needed)
        raise UserError(
            f"there is no folder {name}, and the model {name} cannot be fetched from the Hugging Face hub: "
            f"{_why(name, error)}; or run `hf download {name} {includes} --local-dir DIR` on a machine with access and "
            "give DIR."
        ) from error


def _why(name: str, error: Exception) -> str:
    """What went wrong, and its mend, in half a sentence."""
    from huggingface_hub import errors

    reason = " ".join(str(error).split())[:160].rstrip(". ") or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return (
            f"it is gated; accept its licence at {_SITE}/{name} and run `hf auth login` (or set HF_TOKEN) with a token "
            "of that account"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such model, or it is private; check the spelling, or run `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.IncompleteSnapshotError):
        return f"the hub cannot be reached and its cache lacks some of the files ({reason}); run again with network"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "the hub cannot be reached, or HF_HUB_OFFLINE is set; run again with network"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the hub cannot be reached ({type(error).__name__}: {reason}); run again, it goes on where it stopped"
    return f"{type(error).__name__}: {reason}; run again, it goes on where it stopped"
