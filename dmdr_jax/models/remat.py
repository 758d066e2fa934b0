"""What the backward pass of a network keeps and what it computes again (Chen et al. 2016, arXiv 1604.06174)."""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from dmdr_jax.errors import UserError

REMAT_CHOICES = ("none", "full", "dots", "names")
ATTENTION_NAME = "attention"


def name_attention(x: jax.Array) -> jax.Array:
    """Marks an attention output, which the choice "names" keeps."""
    return checkpoint_name(x, ATTENTION_NAME)


def remat(block: type[nn.Module], choice: str, in_scan: bool) -> type[nn.Module]:
    """The block under the checkpoint policy of that name.

    Args:
      block: a Linen module class.
      choice: what is computed again: "none"; "full", all of each block; "dots", all but matrix products; "names", all
        but attention outputs.
      in_scan: whether the block is the body of a scan.

    Raises:
      UserError: no such choice.
    """
    if choice == "none":
        return block
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "names": jax.checkpoint_policies.save_only_these_names(ATTENTION_NAME),
    }
    if choice not in policies:
        raise UserError(f"remat {choice!r} is unknown; choose one of {', '.join(REMAT_CHOICES)}.")
    # The loop of a scan already keeps the compiler from merging the recomputation with the first computation.
    return nn.remat(block, policy=policies[choice], prevent_cse=not in_scan)
