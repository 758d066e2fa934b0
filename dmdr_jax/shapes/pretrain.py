"""Makes the embedded world's teacher: ``python -m dmdr_jax.shapes.pretrain --config=... --out=DIR``.

Two stages, each resumed or skipped by what it finds in DIR/work: the autoencoder, then the
transformer with its text encoders. DIR/pipeline is written every ``teacher.save_every`` steps: a
diffusers folder in half precision, scored on prompts not trained on.
"""

from pathlib import Path
from typing import Any

from absl import flags

from dmdr_jax import cli

flags.DEFINE_string("out", None, "Folder for the run; the same command goes on where it stopped.", required=True)
cli.define_config("configs/shapes/pretrain_sd3.py")


def main(config: Any) -> None:
    from dmdr_jax.shapes.pretrain_stages import train_teacher

    out = Path(flags.FLAGS.out)
    (out / "work").mkdir(parents=True, exist_ok=True)
    train_teacher(config, out)


if __name__ == "__main__":
    cli.run(main)
