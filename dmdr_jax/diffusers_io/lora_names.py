"""The names of LoRA tensors in the files of other trainers, and the modules of ours that they mean.

Known are the names of PEFT (``base_model.model.M.lora_A.weight``), of diffusers (``unet.M.lora_A.weight``, before 0.22
``unet.M.lora.down.weight`` and ``unet.M.processor.to_q_lora.down.weight``) and of kohya's scripts
(``lora_unet_M.lora_down.weight`` with ``lora_unet_M.alpha``, dots as underscores, and for SDXL the modules named as in
Stability's own code). A name is accepted only if the module it spells is one of the network's: nothing is guessed.
"""

import functools
import re
from collections.abc import Collection, Mapping

from dmdr_jax.diffusers_io import keymap
from dmdr_jax.errors import UserError

A, B, ALPHA = "a", "b", "alpha"

# What follows a module's name, and what the tensor then is.
_TAILS = (
    (re.compile(r"\.lora_A(\.[^.]+)?\.weight$"), A),
    (re.compile(r"\.lora_B(\.[^.]+)?\.weight$"), B),
    (re.compile(r"(\.lora_linear_layer\.|[._]lora\.|\.lora_)down\.weight$"), A),
    (re.compile(r"(\.lora_linear_layer\.|[._]lora\.|\.lora_)up\.weight$"), B),
    (re.compile(r"\.alpha$"), ALPHA),
)
# Tensors of adapters that are no low-rank product.
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon with a Tucker core",
    "oft_": "OFT",
    ".diff": "a full difference",
    ".bias": "a trained bias",
}
_PEFT = "base_model.model."
_NETWORKS = ("transformer", "unet")
_TEXT_ENCODERS = re.compile(r"(base_model\.model\.)?text_encoder(_\d)?\.|lora_te\d?_")
_KOHYA = re.compile(r"lora_(unet|transformer)_")


def split(key: str, modules: Collection[str], component: str, file: object) -> tuple[str, str]:
    """What a tensor of a LoRA file is.

    Args:
      key: its name there.
      modules: the network's modules that have a weight matrix or kernel.
      component: the network: "transformer" or "unet".
      file: for messages.

    Returns:
      (module, `A`, `B` or `ALPHA`).

    Raises:
      UserError: it belongs to another network, to an adapter of another kind, or to no module.
    """
    if _TEXT_ENCODERS.match(key):
        raise UserError(f"{file}: {key!r} trains a text encoder; only a LoRA of the {component} alone can be used.")
    spelled, role = _tail(key)
    named = _component_of(spelled)
    if named not in (None, component):
        raise UserError(f"{file}: {key!r} is of the {named} of another model; this one has a {component}.")
    if role is None:
        kind = next((kind for mark, kind in _OTHER_KINDS.items() if mark in key), None)
        if kind:
            raise UserError(f"{file}: {key!r} is {kind}, not LoRA; only products of two factors can be read.")
    module = _module(spelled, modules, component)
    if role is None or module is None:
        # kohya's names have no dots; compared as such, the likeness shows.
        nearest = keymap.closest(_stripped(spelled, component), modules)
        raise UserError(f"{file}: {key!r} names no LoRA factor of this model; closest modules: {nearest}.")
    return module, role


def _tail(key: str) -> tuple[str, str | None]:
    """A key without what tells the factor, and which one it is; None where nothing tells."""
    for pattern, role in _TAILS:
        if match := pattern.search(key):
            return key[: match.start()], role
    return key, None


def _component_of(spelled: str) -> str | None:
    """The network that a name says it is of: of diffusers' prefixes, as kohya says "unet" of every network."""
    name = spelled.removeprefix(_PEFT)
    return next((network for network in _NETWORKS if name.startswith(f"{network}.")), None)


def _stripped(spelled: str, component: str) -> str:
    """A name without the prefixes that say whose it is, and without diffusers' former attention processors."""
    name = spelled.removeprefix(_PEFT).removeprefix(f"{component}.").removeprefix(_PEFT)
    return _KOHYA.sub("", name, count=1).replace(".processor.", ".")


def _module(spelled: str, modules: Collection[str], component: str) -> str | None:
    name = _stripped(spelled, component)
    # diffusers' former processors said to_out of to_out.0.
    for candidate in (name, f"{name}.0"):
        if candidate in modules:
            return candidate
    if not _KOHYA.match(spelled):
        return None
    return _underscored(tuple(modules)).get(name)


@functools.lru_cache(maxsize=4)
def _underscored(modules: tuple[str, ...]) -> Mapping[str, str]:
    """Modules by the names that kohya's scripts give them; without any that two modules would share."""
    names: dict[str, str] = {}
    shared = set()
    for module in modules:
        for name in {module, stability_name(module, modules) or module}:
            flat = name.replace(".", "_")
            if names.setdefault(flat, module) != module:
                shared.add(flat)
    return {flat: module for flat, module in names.items() if flat not in shared}


# --- Stability's names of the U-Net ----------------------------------------------------------------------------------

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_RESNET |= {"conv_shortcut": "skip_connection"}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def stability_name(module: str, modules: Collection[str]) -> str | None:
    """The name of a U-Net module in the code that SDXL was published with; None where there is none.

    There a level's resnets, each with the spatial transformer that follows it, and its down- or upsampler are
    numbered through: ``input_blocks.1`` is the first resnet after ``conv_in``.

    Args:
      module: diffusers' name, such as ``down_blocks.1.attentions.0.proj_in``.
      modules: all of the network's, from which the number of resnets per level is taken.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    if match := _MIDDLE.fullmatch(module):
        kind, i, rest = match.groups()
        place = 1 if kind == "attentions" else 2 * int(i)
        return f"middle_block.{place}.{_RESNET.get(rest, rest)}"
    if not (match := _BLOCK.fullmatch(module)):
        return None
    side, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    resnets = sum(name.startswith("down_blocks.0.resnets.") and name.endswith(".conv1") for name in modules)
    if side == "down":
        place = 1 + (resnets + 1) * level + (resnets if kind == "downsamplers" else i)
        inner = {"resnets": f"0.{_RESNET.get(rest, rest)}", "attentions": f"1.{rest}", "downsamplers": "0.op"}
        return f"input_blocks.{place}.{inner[kind]}"
    place = (resnets + 1) * level + (resnets if kind == "upsamplers" else i)
    after = 2 if any(name.startswith(f"up_blocks.{level}.attentions.") for name in modules) else 1
    inner = {"resnets": f"0.{_RESNET.get(rest, rest)}", "attentions": f"1.{rest}", "upsamplers": f"{after}.conv"}
    return f"output_blocks.{place}.{inner[kind]}"
