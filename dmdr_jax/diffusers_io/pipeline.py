"""Whole diffusers pipelines: a folder or hub id in, parameter trees and tokenizers; and out again.

    pipeline = load_pipeline("runs/teacher")
    velocity = pipeline.modules["transformer"].apply({"params": pipeline.params["transformer"]}, ...)
    save_pipeline(pipeline, "runs/student", {"transformer": trained}, scheduler_config)

What is saved is a complete folder for ``diffusers.DiffusionPipeline.from_pretrained``.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dmdr_jax.diffusers_io import hub, keymap, safetensors_io
from dmdr_jax.diffusers_io.components import (
    FAMILIES,
    MAX_SEQUENCE_LENGTH,
    SD3,
    Config,
    Family,
    abstract_params,
    buffers,
    build_module,
    class_of,
    read_json,
)
from dmdr_jax.diffusion.process import Flow, Process, VariancePreserving
from dmdr_jax.errors import UserError
from dmdr_jax.models.attention import AttentionKernel

STUDENT_FILE = "dmdr_student.json"
"""Beside ``model_index.json`` of an exported student: the grid and kernel it was trained for."""

DIFFUSERS_VERSION = "0.42.1"
"""The version of the folder format written from scratch."""

_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"
_FULL_PRECISION = ("vae",)

Tree = Any
Shardings = Callable[[str, Tree], Any]


@dataclasses.dataclass
class Pipeline:
    """A diffusers pipeline in JAX.

    Attributes:
      name: what the user called it.
      folder: where it lies.
      family: "sd3" or "sdxl".
      model_index: ``model_index.json``.
      configs: ``config.json`` of each component that the pipeline has.
      scheduler: ``scheduler/scheduler_config.json``.
      modules: Linen module of each component that the pipeline has, loaded or not.
      params: parameter tree of each loaded component.
      tokenizers: the tokenizer of each loaded text encoder, by the encoder's name.
      variant: the variant the weights were read from.
      student: `STUDENT_FILE` where the folder is an exported student, else None.
      encoded: `dmdr_jax.diffusers_io.text.Encoded`, what is known of prompts where the text encoders are not loaded.
      t5_length: tokens of SD3's T5, or those that stand for it.
    """

    name: str
    folder: Path
    family: str
    model_index: Config
    configs: dict[str, Config]
    scheduler: Config
    modules: dict[str, nn.Module]
    params: dict[str, Tree]
    tokenizers: dict[str, Any]
    variant: str | None = None
    student: Config | None = None
    encoded: Any = None
    t5_length: int = MAX_SEQUENCE_LENGTH

    @property
    def kind(self) -> Family:
        """What the family consists of and how it draws by default."""
        return next(family for family in FAMILIES.values() if family.name == self.family)

    @property
    def denoiser(self) -> str:
        """The component that is distilled: "transformer" or "unet"."""
        return self.kind.denoiser

    @property
    def process(self) -> Process:
        """The noise process that the denoiser was trained on."""
        return process_of(self.kind, self.scheduler)

    @property
    def zero_uncond(self) -> bool:
        """Whether the absent prompt is zeros, in place of the encoded empty prompt."""
        return self.family != SD3.name and bool(self.model_index.get("force_zeros_for_empty_prompt", True))

    def attend_with(self, kernel: AttentionKernel) -> None:
        """Has denoiser and codec compute attention over long sequences with a kernel."""
        for name in (self.denoiser, "vae"):
            self.modules[name] = self.modules[name].clone(attention=kernel)


def process_of(family: Family, scheduler_config: Mapping[str, Any]) -> Process:
    """The noise process of a family's denoisers, with the numbers of a scheduler's configuration."""
    return Flow() if family is SD3 else VariancePreserving.from_scheduler(scheduler_config)


def load_pipeline(
    name: str | Path,
    components: Iterable[str] | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    sharding: Shardings | None = None,
    variant: str | None = None,
    t5_length: int | None = None,
) -> Pipeline:
    """Loads a pipeline, one tensor at a time.

    Args:
      name: a diffusers folder or a hub id.
      components: networks to load weights of, such as ``("transformer", "vae")``; None for all that
        the pipeline has.
      dtype: type of the parameters: one for all (the VAE stays fp32, as its activations overflow
        fp16), or a mapping by component (those not in it are fp32; None keeps the stored type).
      compute_dtype: type of activations and matrix products, likewise; None: that of the parameters.
      sharding: ``(component, abstract tree) -> sharding or tree of shardings`` for the arrays.
      variant: weights to prefer, such as ``"fp16"``.
      t5_length: see `Pipeline`; None for an exported student's own, else diffusers' default.

    Raises:
      UserError: the folder is not a supported pipeline, or something in it is missing or damaged.
    """
    wanted = None if components is None else list(components)
    folder = hub.locate(str(name), wanted, variant)
    model_index, scheduler, configs = read_configs(folder)
    family, present = hub.family_of(model_index, folder), list(configs)
    loaded = present if wanted is None else _chosen(wanted, present, family, folder)
    if variant and not any(safetensors_io.has_variant(folder / c, variant) for c in present):
        raise UserError(f"{folder} has no weights of the variant {variant!r}; leave the variant out.")

    modules, params, tokenizers = {}, {}, {}
    for component in present:
        stored = dtype_of(component, dtype)
        compute = dtype_of(component, compute_dtype) if compute_dtype is not None else stored or jnp.float32
        modules[component] = build_module(family.classes[component][1], configs[component], compute)
    for component in loaded:
        if component in family.tokenizers:
            tokenizers[component] = _load_tokenizer(folder, family.tokenizers[component], model_index)
    for component in loaded:
        abstract = abstract_params(family.classes[component][1], modules[component])
        params[component] = safetensors_io.read_tree(
            folder / component,
            abstract,
            dtype_of(component, dtype),
            sharding(component, abstract) if sharding else None,
            variant,
            buffers(family.classes[component][1], modules[component]),
        )
    student = read_json(folder / STUDENT_FILE) if (folder / STUDENT_FILE).exists() else None
    return Pipeline(
        name=str(name),
        folder=folder,
        family=family.name,
        model_index=model_index,
        configs=configs,
        scheduler=scheduler,
        modules=modules,
        params=params,
        tokenizers=tokenizers,
        variant=variant,
        student=student,
        t5_length=t5_length or (student or {}).get("t5_length", MAX_SEQUENCE_LENGTH),
    )


def load_network(folder: str | Path, dtype: Any = jnp.float32) -> tuple[nn.Module, Tree]:
    """One network that is no part of a pipeline, computing in fp32: its module and its parameters in ``dtype``.

    Args:
      folder: with ``config.json`` and safetensors weights, or a hub id.

    Raises:
      UserError: the folder is absent, damaged, or holds a network that is not known here.
    """
    folder = hub.locate_network(str(folder))
    config = read_json(folder / _CONFIG)
    class_name = class_of(config)
    if class_name is None:
        raise UserError(f"{folder / _CONFIG} does not say which network it describes (_class_name).")
    module = build_module(class_name, config)
    return module, safetensors_io.read_tree(folder, abstract_params(class_name, module), dtype)


def save_pipeline(
    pipeline: Pipeline,
    out_dir: str | Path,
    params: Mapping[str, Tree] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
    student: Mapping[str, Any] | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a complete diffusers folder: the pipeline with other parameters.

    Args:
      pipeline: the pipeline the parameters belong to; what is not in ``params`` is copied from its folder.
      out_dir: must not exist or be empty, unless ``overwrite``; appears only when complete.
      params: parameter tree of each changed component, full and merged.
      scheduler_config: replaces the pipeline's, its class in ``_class_name`` (see `dmdr_jax.exporting`).
      student: written to `STUDENT_FILE`.
      dtype: type to store the changed components in; None for the type they have in the folder.

    Raises:
      UserError: the place is taken or cannot be written, or a tree is not of the pipeline.
    """
    params = dict(params or {})
    for component, tree in params.items():
        _check_tree(pipeline, component, tree)
    with _new_folder(Path(out_dir), overwrite) as folder:
        for component, config in pipeline.configs.items():
            source = pipeline.folder / component
            if component in params:
                stored = dtype or safetensors_io.stored_dtype(source, pipeline.variant)
                save_component(folder / component, config, params[component], stored)
            else:
                _copy_component(source, folder / component, pipeline.variant)
        _copy_rest(pipeline, folder)
        _write_json(folder / _SCHEDULER, scheduler_config or pipeline.scheduler)
        if student is not None:
            _write_json(folder / STUDENT_FILE, student)
        index = _index_of(pipeline)
        if scheduler_config is not None:
            index["scheduler"] = ["diffusers", scheduler_config["_class_name"]]
        _write_json(folder / hub.INDEX, index)
    return Path(out_dir)


def save_component(folder: str | Path, config: Mapping[str, Any], params: Tree, dtype: Any = None) -> None:
    """Writes one network as diffusers or transformers would: ``config.json`` and the weights.

    Args:
      folder: such as ``.../vae``; made if absent.
      config: with diffusers' ``_class_name``, or transformers' ``architectures``.
      params: parameter tree.
      dtype: type to store; None keeps each leaf's own.
    """
    stem = safetensors_io.STEMS[0 if "_class_name" in config else 1]
    safetensors_io.write_tree(folder, params, dtype, stem)
    _write_json(Path(folder) / _CONFIG, config)


def new_pipeline_folder(
    out_dir: str | Path,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Tree],
    tokenizers: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    dtype: Any = None,
    overwrite: bool = False,
    family: Family = SD3,
) -> Path:
    """Writes a complete diffusers folder for networks trained from scratch.

    Args:
      out_dir: must not exist or be empty, unless ``overwrite``; appears only when complete.
      configs: ``config.json`` of each component; ``_class_name`` or ``architectures`` are filled in.
      params: parameter tree of each component; those that the family can lack may be left out.
      tokenizers: by text encoder; anything with transformers' ``save_pretrained``.
      scheduler_config: of the family's scheduler.
      dtype: type to store; None keeps each leaf's own.

    Raises:
      UserError: a component is missing, or the place is taken or cannot be written.
    """
    absent = [c for c in family.classes if c not in family.optional and (c not in params or c not in configs)]
    if absent:
        raise UserError(f"a {family.pipeline_class} needs {', '.join(absent)} too.")
    index: Config = {"_class_name": family.pipeline_class, "_diffusers_version": DIFFUSERS_VERSION}
    with _new_folder(Path(out_dir), overwrite) as folder:
        for component, (library, class_name) in family.classes.items():
            index[component] = [library, class_name] if component in params else [None, None]
            if component in params:
                named = {"_class_name": class_name} if library == "diffusers" else {"architectures": [class_name]}
                save_component(folder / component, {**named, **configs[component]}, params[component], dtype)
        for component, tokenizer in family.tokenizers.items():
            index[tokenizer] = [None, None]
            if component in params:
                tokenizers[component].save_pretrained(folder / tokenizer)
                index[tokenizer] = ["transformers", type(tokenizers[component]).__name__]
        named = {"_class_name": family.scheduler, "_diffusers_version": DIFFUSERS_VERSION}
        _write_json(folder / _SCHEDULER, {**named, **scheduler_config})
        _write_json(folder / hub.INDEX, {**index, "scheduler": ["diffusers", family.scheduler], **family.settings})
    return Path(out_dir)


def _read_index(folder: Path) -> Config:
    """``model_index.json``, or why a folder without one is not a pipeline."""
    if (folder / hub.INDEX).is_file():
        return read_json(folder / hub.INDEX)
    if (folder / _CONFIG).is_file():
        kind = class_of(read_json(folder / _CONFIG)) or "network"
        raise UserError(f"{folder} is a single {kind}, not a pipeline; give the folder above it, with {hub.INDEX}.")
    raise UserError(f"{folder} is not a diffusers pipeline: it has no {hub.INDEX}.")


def read_configs(folder: Path) -> tuple[Config, Config, dict[str, Config]]:
    """``model_index.json``, the scheduler's configuration, and that of every network the pipeline has, checked."""
    model_index = _read_index(folder)
    family = hub.family_of(model_index, folder)
    present = _present(folder, model_index, family)
    configs = {component: _read_config(folder, component, family) for component in present}
    return model_index, read_json(folder / _SCHEDULER), configs


def components_of(name: str, optional: bool = True) -> list[str]:
    """The components of a pipeline (named as for `load_pipeline`), with or without what it can do without: SD3's T5."""
    folder = hub.locate_configs(name)
    model_index, _, configs = read_configs(folder)
    left_out = () if optional else hub.family_of(model_index, folder).optional
    return [component for component in configs if component not in left_out]


def _present(folder: Path, model_index: Config, family: Family) -> list[str]:
    """The components that the pipeline has, in the family's order."""
    present = []
    for component in family.classes:
        declared = (model_index.get(component) or [None, None])[1] is not None
        if declared and (folder / component).is_dir():
            present.append(component)
        elif component not in family.optional:
            raise UserError(f"{folder} is not complete: it has no {component}/ folder.")
    return present


def _chosen(wanted: list[str], present: list[str], family: Family, folder: Path) -> list[str]:
    """The wanted components that are there; UserError for one that cannot be."""
    for component in wanted:
        if component not in family.classes:
            known = ", ".join(family.classes)
            raise UserError(f"a {family.pipeline_class} has no component {component!r}; it has {known}.")
        if component not in present:
            raise UserError(f"{folder} has no {component}; load it without.")
    return [component for component in present if component in wanted]


def _read_config(folder: Path, component: str, family: Family) -> Config:
    """A component's ``config.json``, checked to be of the class that its place is for."""
    config = read_json(folder / component / _CONFIG)
    found, expected = class_of(config), family.classes[component][1]
    if found not in (None, expected):
        raise UserError(f"{folder / component} holds a {found}, but a {family.pipeline_class} has a {expected} there.")
    return config


def dtype_of(component: str, dtype: Any) -> Any:
    """The type chosen for one component: see `load_pipeline`."""
    if isinstance(dtype, Mapping):
        return dtype.get(component, jnp.float32)
    return jnp.float32 if component in _FULL_PRECISION else dtype


def _load_tokenizer(folder: Path, name: str, model_index: Config) -> Any:
    """A tokenizer of the folder, as transformers reads it without PyTorch."""
    import transformers

    class_name = (model_index.get(name) or [None, None])[1]
    if class_name is None or not (folder / name).is_dir():
        raise UserError(f"{folder} is not complete: it has a text encoder but no {name}/ for it.")
    kind = getattr(transformers, class_name, None) or transformers.AutoTokenizer
    try:
        return kind.from_pretrained(str(folder / name), local_files_only=True)
    # transformers raises whatever its parser of the day raises.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / name} cannot be read as a {class_name} ({reason}).") from error


def _check_tree(pipeline: Pipeline, component: str, tree: Tree) -> None:
    """UserError unless ``tree`` has the paths and shapes of the component."""
    if component not in pipeline.configs:
        raise UserError(f"{pipeline.folder} has no {component} to replace.")
    class_name = hub.family_of(pipeline.model_index, pipeline.folder).classes[component][1]
    expected = {p: leaf.shape for p, leaf in keymap.leaves(abstract_params(class_name, pipeline.modules[component]))}
    given = {p: tuple(leaf.shape) for p, leaf in keymap.leaves(tree)}
    for path in sorted(set(expected) ^ set(given)) + [p for p in expected if given.get(p) != expected[p]]:
        raise UserError(
            f"these parameters are not of the {component} of {pipeline.folder}: {'/'.join(path)} is "
            f"{given.get(path, 'absent')} here and {expected.get(path, 'absent')} there."
        )


@contextlib.contextmanager
def _new_folder(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes ``out_dir`` when the block has ended well, and else leaves nothing."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if not overwrite:
            raise UserError(f"{out_dir} exists: give another name or --overwrite.")
        if not (out_dir / hub.INDEX).is_file():
            raise UserError(f"{out_dir} is no pipeline's folder, which --overwrite could replace: give another name.")
    try:
        out_dir.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.absolute().parent))
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error}.") from error
    try:
        folder.chmod(0o755)
        yield folder
        if out_dir.exists():
            out_dir.rename(folder.with_name(folder.name + ".old"))
        folder.rename(out_dir)
    except OSError as error:
        raise UserError(f"cannot write {out_dir}: {error}; nothing was left under that name.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(folder.name + ".old"), ignore_errors=True)


def _copy_component(source: Path, target: Path, variant: str | None) -> None:
    """Copies a network's config and weights, a variant's under the plain names (so it loads without asking)."""
    target.mkdir(parents=True)
    shutil.copyfile(source / _CONFIG, target / _CONFIG)
    names = {}
    for file in set(safetensors_io.weight_files(source, variant).values()):
        names[file.name] = file.name.replace(f".{variant}", "", 1) if variant else file.name
        shutil.copyfile(file, target / names[file.name])
    found = safetensors_io.find_checkpoint(source, variant)
    if found.suffix == ".json":
        index = read_json(found)
        index["weight_map"] = {key: names[name] for key, name in index["weight_map"].items()}
        _write_json(target / safetensors_io.index_names(found.name.split(".")[0], None)[0], index)


def _copy_rest(pipeline: Pipeline, folder: Path) -> None:
    """Copies what is no network of ours: tokenizers, and parts such as an image encoder."""
    ours = {"scheduler", *pipeline.configs}
    for name, value in _index_of(pipeline).items():
        source = pipeline.folder / name
        if name not in ours and isinstance(value, list) and value[1] is not None and source.is_dir():
            shutil.copytree(source, folder / name, copy_function=shutil.copyfile)


def _index_of(pipeline: Pipeline) -> Config:
    """``model_index.json`` with the components that the folder turned out to lack set to null."""
    index = dict(pipeline.model_index)
    for component, tokenizer in hub.family_of(index, pipeline.folder).tokenizers.items():
        if component not in pipeline.configs:
            index[component] = index[tokenizer] = [None, None]
    return index


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors_io.write_text(file, json.dumps(dict(value), indent=2) + "\n")
