"""Which parameters are split over the mesh axis `fsdp`, by path. The first rule that is found in a path decides.

There are two sets: of what is trained (with its moments and its average) and of what is frozen. The denoiser's frozen
weights are split like the trained ones, or `WHOLE` on every device, which saves gathering them in every pass where
memory allows it; see `dmdr_jax.training.mesh_choice`.
"""

import re
from collections.abc import Sequence

Rules = tuple[tuple[str, bool], ...]
"""Patterns for dotted paths, and whether such a parameter is split; the axis is `models.placement.split_spec`'s."""

WHOLE: Rules = ((r"", False),)
TRAINED: Rules = ((r"", True),)
# A table of positions is cut before it is used, and most of it is not used.
FROZEN: Rules = ((r"(^|\.)pos_embed\.pos_embed$", False), (r"", True))

SPLIT_COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Frozen networks with rules FROZEN; the others are small, and whole."""


def is_split(path: Sequence[str], rules: Rules) -> bool:
    """What the first rule says that is found in the path; whole where there is none."""
    dotted = ".".join(path)
    return next((split for pattern, split in rules if re.search(pattern, dotted)), False)
