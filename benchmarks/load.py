"""What reading a checkpoint costs: time and memory of our reader beside the safetensors library's.

    python -m benchmarks.load --full            # SDXL's U-Net at its published size: 5.1 GB of disk and of memory
    python -m benchmarks.load --tiny            # the same in miniature, in seconds

Writes a folder of random weights in fp16 (or takes --folder), reads it once so that the page cache is warm, and then
runs each reader alone in fresh processes, by turns; the best time counts.

* safetensors: `safe_open(file, "np").get_tensor(key)` for every key, the arrays kept.
* dmdr_jax: `read_tree` into the parameter tree of the Flax U-Net: our layout, blocks stacked, jax arrays.

Memory is the peak of the whole resident set during the reading less what was resident before it. That counts pages of
the mapped file too, although the system could take these back at any time: they are handed back as the reading goes.
The bounds the project sets itself: 1.5 times the library's time, 1.15 times the file plus its largest tensor.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from dmdr_jax import cli

TIME_BOUND, MEMORY_BOUND = 1.5, 1.15
READERS = ("safetensors", "dmdr_jax")
WEIGHTS = "diffusion_pytorch_model.safetensors"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
TINY = {"block_out_channels": [64, 128, 256], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 128}


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    size = p.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="SDXL's U-Net, 5.1 GB in fp16")
    size.add_argument("--tiny", action="store_true", help="a small one of the same kind (the default)")
    p.add_argument("--folder", help="where the weights are, or are to be written (default: a folder that is removed)")
    p.add_argument("--runs", type=int, default=3, help="processes per reader (default: 3)")
    p.add_argument("--json", help="file for the numbers")
    p.add_argument("--child", choices=READERS, help=argparse.SUPPRESS)
    return p


def main(args: Any) -> None:
    if args.child:
        print(json.dumps(measure(args.child, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / WEIGHTS).exists():
            print(f"writing random weights to {folder}", flush=True)
            write_random(folder, unet_config(args.full))
        numbers = compare(folder, args.runs)
    show(numbers)
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")


def unet_config(full: bool) -> dict[str, Any]:
    """The ``config.json`` of SDXL's U-Net, or of a small one."""
    from dmdr_jax.diffusers_io.published import published_models

    config = published_models()[SDXL]["components"]["unet"]["config"]
    return config if full else {**config, **TINY, "transformer_layers_per_block": [1, 2, 3]}


def abstract_unet(folder: Path) -> Any:
    """(module, abstract parameters) of a folder's U-Net."""
    from dmdr_jax.diffusers_io import components

    config = json.loads((folder / "config.json").read_text())
    module = components.build_module("UNet2DConditionModel", config)
    return module, components.abstract_params("UNet2DConditionModel", module)


def write_random(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """A U-Net folder with random weights in fp16 that keep activations near 1; one tensor in memory at a time."""
    import numpy as np

    from dmdr_jax.diffusers_io import keymap, safetensors_io

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shapes = {entry.key: entry.shape for entry in keymap.entries(abstract_unet(folder)[1])}

    def tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng([seed, zlib.crc32(key.encode())]).standard_normal(shape, np.float32)
        if len(shape) > 1:
            noise *= np.float32(np.prod(shape[1:]) ** -0.5)
        else:
            noise = 0.1 * noise + key.endswith("weight")
        return noise.astype(np.float16)

    described = {key: (np.float16, shape) for key, shape in shapes.items()}
    tensors = (tensor(key, shape) for key, shape in shapes.items())
    safetensors_io.write_tensors(folder / WEIGHTS, described, tensors)


def compare(folder: Path, runs: int) -> dict[str, Any]:
    """Runs the readers by turns, each in a process of its own."""
    from dmdr_jax.diffusers_io.tensor_file import TensorFile

    headers = TensorFile(folder / WEIGHTS).headers.values()
    file_size = (folder / WEIGHTS).stat().st_size
    with open(folder / WEIGHTS, "rb") as stream:  # into the page cache
        while stream.read(1 << 24):
            pass
    measured: dict[str, list[dict[str, float]]] = {reader: [] for reader in READERS}
    for _ in range(runs):
        for reader in READERS:
            command = [sys.executable, "-m", "benchmarks.load", "--child", reader, "--folder", str(folder)]
            measured[reader].append(json.loads(subprocess.check_output(command).splitlines()[-1]))
    seconds = {reader: min(run["seconds"] for run in measured[reader]) for reader in READERS}
    memory = {reader: max(run["memory"] for run in measured[reader]) for reader in READERS}
    largest = max(header.size for header in headers)
    return {
        "file": file_size,
        "tensors": len(headers),
        "largest": largest,
        "seconds": seconds,
        "memory": memory,
        "time_ratio": seconds["dmdr_jax"] / seconds["safetensors"],
        "memory_ratio": (memory["dmdr_jax"] - largest) / file_size,
        "runs": measured,
    }


def show(numbers: dict[str, Any]) -> None:
    gb = 1e-9
    print(f"{numbers['file'] * gb:.3f} GB, {numbers['tensors']} tensors, the largest {numbers['largest'] * gb:.3f} GB")
    for reader in READERS:
        seconds, memory = numbers["seconds"][reader], numbers["memory"][reader]
        print(f"{reader:12} {seconds:8.2f} s {memory * gb:9.3f} GB more in memory at the peak")
    print(f"time: {numbers['time_ratio']:.2f} x safetensors (bound {TIME_BOUND})")
    print(f"memory: {numbers['memory_ratio']:.3f} x file + largest tensor (bound {MEMORY_BOUND})")


def measure(reader: str, folder: Path) -> dict[str, float]:
    """Seconds, and bytes of resident memory at the peak beyond those before, in this process."""
    read = prepare(reader, folder)
    touch((folder / WEIGHTS).stat().st_size)
    before = reset_peak()
    start = time.perf_counter()
    kept = read()
    seconds = time.perf_counter() - start
    memory = resident("VmHWM") - before
    del kept
    return {"seconds": seconds, "memory": memory}


def touch(size: int) -> None:
    """Takes so much memory and gives it back: a virtual machine's host has to find pages that lay idle for a while,
    which takes longer than reading into them, and the reader with more to import would pay more of it."""
    import numpy as np

    blocks = [np.ones(2**26, np.uint8) for _ in range(-(-size // 2**26))]
    blocks.clear()


def prepare(reader: str, folder: Path) -> Any:
    """The reading itself, with all that it imports and traces already there."""
    if reader == "safetensors":
        from safetensors import safe_open

        def library() -> Any:
            with safe_open(folder / WEIGHTS, "np") as file:
                return [file.get_tensor(key) for key in list(file.keys())]

        return library
    import jax
    import numpy as np

    from dmdr_jax.diffusers_io import safetensors_io

    abstract = abstract_unet(folder)[1]
    jax.block_until_ready(jax.device_put(np.zeros(1)))
    return lambda: jax.block_until_ready(safetensors_io.read_tree(folder, abstract))


def reset_peak() -> int:
    """Makes the kernel forget the process's peak so far; the resident bytes now."""
    with contextlib.suppress(
        OSError
    ):  # else the peak is of the process's whole life, which a large file exceeds anyway
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    cli.run(main, parser())
