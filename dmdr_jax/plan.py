"""Says whether a run fits a TPU slice, how fast it could be there and what it would cost, without having one.

    python -m dmdr_jax.plan --config=configs/sd3_medium.py --topology=v5e:2x4 [--topology=v5p-64 ...]
                            [--images_per_chip=4] [--json=FILE] [--config.KEY=VALUE ...]
    python -m dmdr_jax.plan --config=configs/sd35_large.py --sweep [--topology=v5e --topology=v5p] [--prices=v5e=1.2,..]

The trainer's own programs, its two updates and the drawing of its grids, are built from shapes alone and compiled for
the slice by libtpu, which needs no TPU (pip install libtpu); without it the answer is arithmetic, and says so. Slices
are named as JAX does (v5e:4x4), or as Google Cloud does (v5litepod-16, v5p-64: cores, two per chip), several slices as
2*v5e:16x16.

Verdicts: green, all of it fits; amber, it fits only if the compiler's estimate of the peak is what counts; red.
"""

import sys
from typing import Any

from absl import flags

from dmdr_jax import cli

flags.DEFINE_multi_string("topology", [], "Slice to plan for; with --sweep, kinds of chip. May be given several times.")
flags.DEFINE_list("images_per_chip", [], "Batch as images on each chip, in place of config.batch; several make rows.")
flags.DEFINE_string("json", "", "File for the same as JSON; - or nothing: print it in place of the table.")
flags.DEFINE_bool("sweep", False, "Find the cheapest slice and batch that fit.")
flags.DEFINE_list("prices", [], "Of a chip-hour, KIND=PRICE, for --sweep; else chip-hours are compared.")
flags.DEFINE_bool("compile", True, "Ask libtpu; otherwise arithmetic alone, in seconds.")
cli.define_config()


def main(config: Any) -> None:
    from dmdr_jax.planning import command

    given = flags.FLAGS
    command.run(
        config=given.config,
        overrides=cli.overrides_of(sys.argv[1:]),
        topologies=given.topology,
        images=given.images_per_chip,
        json_file=given.json,
        sweeping=given.sweep,
        prices=given.prices,
        compile_it=given.compile,
    )


if __name__ == "__main__":
    cli.run(main, argv=[f"{argument}=-" if argument == "--json" else argument for argument in sys.argv[1:]])
