"""What the step benchmarks compute: one configuration, one set of random numbers, whichever library computes with them.

Nothing is downloaded: published models are known as shapes, their weights are drawn, each from its checkpoint key.
"""

import argparse
import dataclasses
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = {
    "tiny": "shapes:sd3",
    "tiny-sdxl": "shapes:sdxl",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
FAKE_UPDATES = 5
"""Fake updates per generator update, as DMDR trains."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """The size of a step.

    Attributes:
      size: a name in `MODELS`.
      batch: images per update.
      pixels: side of the images; 0: the model's own.
      dtype: of activations, matrix products and frozen weights; what is trained is fp32.
      generator: "lora" or "full".
      remat: a name in `dmdr_jax.models.remat.REMAT_CHOICES`; in PyTorch all but "none" is gradient checkpointing.
      attention: a name in `dmdr_jax.models.attention.KERNELS`; PyTorch chooses its own.
    """

    size: str = "tiny"
    batch: int = 4
    pixels: int = 0
    dtype: str = "float32"
    generator: str = "lora"
    remat: str = "none"
    attention: str = "auto"

    def config(self, **changes: Any) -> Any:
        """The training configuration: distribution matching alone, all else as DMDR trains."""
        from configs import base

        c = base.get_config()
        c.model, c.batch = MODELS[self.size], self.batch
        c.height = c.width = self.pixels
        c.compute_dtype = c.base_dtype = self.dtype
        c.generator.kind, c.remat, c.attention = self.generator, self.remat, self.attention
        c.update(changes)
        return c


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Options from which `of` makes a workload."""
    p.add_argument("--size", choices=sorted(MODELS), help="default: tiny on a CPU, sd3 elsewhere")
    p.add_argument("--batch", type=int, help="images per update (default: 16 tiny ones, else 4)")
    p.add_argument("--pixels", type=int, default=0, help="side of the images (default: the model's own)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 elsewhere")
    p.add_argument("--generator", choices=("lora", "full"), default="lora")
    p.add_argument("--remat", choices=("none", "full", "dots", "names"), default="none")
    p.add_argument("--attention", choices=("auto", "plain", "splash", "cudnn"), default="auto")
    p.add_argument("--repeats", type=int, default=3, help="measurements of each step (default: 3)")
    p.add_argument("--iterations", type=int, default=5, help="steps in one measurement (default: 5)")
    p.add_argument("--json", type=Path, help="file for the numbers")


def of(args: argparse.Namespace, on_cpu: bool) -> Workload:
    """The workload of parsed options, for a machine of that kind."""
    size = args.size or ("tiny" if on_cpu else "sd3")
    batch = args.batch or (16 if size.startswith("tiny") else 4)
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    return Workload(size, batch, args.pixels, dtype, args.generator, args.remat, args.attention)


def abstract_run(workload: Workload, mesh: Any = None, **changes: Any) -> Any:
    """The run as shapes, its text tokens all there: PyTorch's networks know no key that counts for several."""
    from dmdr_jax.training.abstract import AbstractRun

    config = workload.config(**changes)
    run = AbstractRun.of(config)
    run = run if mesh is None else run.attending(config, mesh)
    frozen = run.frozen.replace(uncond=run.frozen.uncond.replace(key_bias=None), vae={})
    return dataclasses.replace(run, frozen=frozen, batch=run.batch.replace(cond=run.batch.cond.replace(key_bias=None)))


def weight(key: str, shape: tuple[int, ...], seed: int = 0) -> Any:
    """A tensor of a checkpoint, fp32 in its layout there: matrices of unit gain, vectors near their usual 0 or 1."""
    import numpy as np

    noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape, np.float32)
    if len(shape) > 1:
        return noise * np.float32(np.prod(shape[1:]) ** -0.5)
    return np.float32(0.1) * noise + np.float32(key.endswith("weight"))


def base_weights(abstract: Any, seed: int = 0) -> Any:
    """The frozen denoiser: `weight` for every checkpoint tensor of a tree of shapes, on the host."""
    import numpy as np

    from dmdr_jax.diffusers_io import keymap

    leaves = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in keymap.leaves(abstract)}
    for entry in keymap.entries(abstract):
        leaves[entry.path][entry.index] = entry.to_ours(weight(entry.key, entry.shape, seed))
    return keymap.unflatten(leaves)


def conditioning(abstract: Any, size: tuple[int, int], seed: int) -> Any:
    """Drawn prompts for a `Conditioning` of shapes; SDXL's six numbers are those of uncropped images."""
    import numpy as np

    rng = np.random.default_rng(seed)
    drawn = {
        name: rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        for name in ("prompt_embeds", "pooled")
        if (shape := getattr(abstract, name)) is not None
    }
    if abstract.time_ids is not None:
        row = np.asarray([*size, 0, 0, *size], abstract.time_ids.dtype)
        drawn["time_ids"] = np.broadcast_to(row, abstract.time_ids.shape).copy()
    return abstract.replace(**drawn)


def clocked(run: Callable[[int], None], repeats: int, iterations: int) -> list[tuple[float, float]]:
    """Seconds of one step by the wall's clock and by the process's, which others on the machine do not lengthen.

    Args:
      run: makes so many steps and waits for the last; called once before, for what is only done once.
    """
    found = []
    for i in range(repeats + 1):
        steps = iterations if i else 1
        start = time.perf_counter(), time.process_time()
        run(steps)
        found.append(((time.perf_counter() - start[0]) / steps, (time.process_time() - start[1]) / steps))
    return found[1:]


def summary(found: list[tuple[float, float]], batch: int) -> dict[str, Any]:
    """Of `clocked`: median and extremes, the median of the process's own clock, images per second at the median."""
    seconds, own = (sorted(times) for times in zip(*found))
    middle = seconds[len(seconds) // 2]
    extremes = {"least": seconds[0], "most": seconds[-1], "process_seconds": own[len(own) // 2]}
    return {"seconds": middle, **extremes, "images_per_second": batch / middle}


def outer(fake: dict[str, Any], generator: dict[str, Any], batch: int) -> dict[str, float]:
    """A generator update with its fake updates, of their summaries: its seconds, and images per second of training."""
    total = {name: generator[name] + FAKE_UPDATES * fake[name] for name in ("seconds", "process_seconds")}
    return total | {"images_per_second": batch / total["seconds"]}


def write(file: Path | None, numbers: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
