"""Writes a run's student for diffusers: a complete pipeline folder, or a LoRA file.

    python -m dmdr_jax.export --checkpoint runs/mine --out student
    python -m dmdr_jax.export --checkpoint runs/mine --out student.safetensors --lora

The folder's scheduler is set so that diffusers' default call draws exactly the trained student.
"""

import argparse
from typing import Any

from dmdr_jax import cli


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--checkpoint", required=True, help="a run's workdir, or one checkpoint in it")
    p.add_argument("--out", required=True, help="folder to make, or with --lora the .safetensors file")
    p.add_argument("--lora", action="store_true", help="write the generator's LoRA alone")
    p.add_argument("--no_ema", action="store_true", help="the last weights in place of their average")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="stored type (default: the teacher's)")
    p.add_argument("--kernel", choices=("ode", "renoise"), help="sampler to set up (default: the student's own)")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")
    return p


def main(args: Any) -> None:
    from dmdr_jax.exporting import export_folder, export_lora
    from dmdr_jax.model import open_checkpoint

    model = open_checkpoint(args.checkpoint, use_ema=not args.no_ema)
    if args.lora:
        print(export_lora(model, args.out, args.dtype, args.kernel, args.overwrite))
    else:
        print(export_folder(model, args.out, args.dtype, args.kernel, args.overwrite))


if __name__ == "__main__":
    cli.run(main, parser())
