"""Trains a few-step generator from a diffusion model: DMDR.

    python -m dmdr_jax.train --config=configs/shapes/sd3.py --workdir=runs/shapes_sd3 [--config.steps=200 ...]

The same command in the same workdir goes on where it stopped. The workdir gets metrics.jsonl and
TensorBoard curves, samples/ (a grid of the student beside the teacher's), checkpoints/ and config.json.
"""

from typing import Any

from absl import flags

from dmdr_jax import cli

flags.DEFINE_string("workdir", None, "Folder of the run: made if absent, gone on with if not.", required=True)
cli.define_config()


def main(config: Any) -> None:
    from dmdr_jax.training import loop

    loop.train(config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.run(main)
