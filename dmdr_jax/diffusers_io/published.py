"""Pipelines as shapes: what a model consists of, without a byte of its weights.

For the published models the configurations stand in ``published_models.json``, so that nothing is downloaded either:
`plan` and tests compile their train steps at full size from these.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dmdr_jax.diffusers_io import hub, pipeline
from dmdr_jax.diffusers_io.components import FAMILIES, Config, abstract_params, build_module
from dmdr_jax.diffusers_io.pipeline import Pipeline

MODELS = Path(__file__).with_name("published_models.json")

Tree = Any


@functools.cache
def published_models() -> dict[str, Config]:
    """By hub id: ``model_index``, ``scheduler``, and ``components`` with each one's ``config`` and ``parameters``."""
    models = json.loads(MODELS.read_text(encoding="utf-8"))
    return {model["repository"]: model for model in models.values()}


def abstract_pipeline(name: str | Path, dtype: Any = jnp.float32, compute_dtype: Any = None) -> Pipeline:
    """A pipeline whose parameters are ``jax.ShapeDtypeStruct`` and which has no tokenizers.

    Args:
      name: a published model's hub id, a diffusers folder, or another hub id, of which only configurations are fetched.
      dtype, compute_dtype: as for `dmdr_jax.diffusers_io.pipeline.load_pipeline`.

    Raises:
      UserError: it is not a supported pipeline.
    """
    known = published_models().get(str(name))
    if known is not None and not Path(name).exists():
        folder, index, scheduler = Path(name), known["model_index"], known["scheduler"]
        configs = {component: value["config"] for component, value in known["components"].items()}
    else:
        folder = hub.locate_configs(str(name))
        index, scheduler, configs = pipeline.read_configs(folder)
    family = FAMILIES[index["_class_name"]]
    modules, params = {}, {}
    for component, config in configs.items():
        class_name = family.classes[component][1]
        stored = pipeline.dtype_of(component, dtype)
        compute = pipeline.dtype_of(component, compute_dtype) if compute_dtype is not None else stored or jnp.float32
        modules[component] = build_module(class_name, config, compute)
        params[component] = _as_dtype(abstract_params(class_name, modules[component]), stored or jnp.float32)
    return Pipeline(str(name), folder, family.name, index, configs, scheduler, modules, params, tokenizers={})


def _as_dtype(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
