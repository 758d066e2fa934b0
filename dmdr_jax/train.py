"""Trains a few-step generator from a diffusion model: DMDR.

    python -m dmdr_jax.train --config=configs/shapes/sd3.py --workdir=runs/shapes_sd3 [--config.steps=200 ...]

The same command in the same workdir goes on where it stopped; SIGTERM makes it save and stop. The workdir gets
metrics.jsonl and TensorBoard curves, samples/ (a grid of the student beside the teacher's), checkpoints/ and
config.json. It may be a gs:// folder, and must be one that all hosts share where there are several.

On several hosts, give the same command on each. On Cloud TPU (one slice or many), Slurm and Open MPI they find each
other; elsewhere --coordinator, --processes and --process_id, or the environment variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, say where process 0 is, how many there are, and which this is.
"""

from typing import Any

from absl import flags

from dmdr_jax import cli
from dmdr_jax.errors import UserError

flags.DEFINE_string("workdir", None, "Folder of the run: made if absent, gone on with if not.", required=True)
flags.DEFINE_string("coordinator", "", "Of several processes: HOST:PORT of process 0, the port any that is free.")
flags.DEFINE_integer("processes", 0, "Of several processes: how many.")
flags.DEFINE_integer("process_id", -1, "Of several processes: which this is, from 0.")
cli.define_config()


def main(config: Any) -> None:
    from dmdr_jax.training import loop, runtime

    given = flags.FLAGS
    if not given.workdir.strip():
        raise UserError("--workdir is empty: give the run a folder.")
    process_id = None if given.process_id < 0 else given.process_id
    with runtime.joined(given.coordinator or None, given.processes or None, process_id) as stop:
        loop.train(config, given.workdir, stop)


if __name__ == "__main__":
    cli.run(main)
