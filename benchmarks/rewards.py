"""Images per second and peak memory of the rewards' image towers, scored and with the gradient to the pixels.

    python -m benchmarks.rewards --towers h14 imagereward --batch 32 --microbatch 8 --image-size 1024
    python -m benchmarks.rewards --topology v6e:1x1 --towers h14          # of a TPU chip that is not here, memory alone

Weights are random: speed and memory do not depend on them. The tiny size is for trying the program on a CPU.
Memory is what the compiler plans for one call, parameters and images included; `in use` is the most that the device
has reported so far, where it reports that. With --topology the TPU's own compiler plans, and nothing runs.
"""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

from dmdr_jax import cli

# Width, layers, heads, feed-forward width, image size, patch size, width of the common space.
CLIPS = {
    "b32": (768, 12, 12, 3072, 224, 32, 512),
    "l14": (1024, 24, 16, 4096, 224, 14, 768),
    "h14": (1280, 32, 16, 5120, 224, 14, 1024),
    "h14-378": (1280, 32, 16, 5120, 378, 14, 1024),
    "g14": (1408, 40, 16, 6144, 224, 14, 1024),
    "bigg14": (1664, 48, 16, 8192, 224, 14, 1280),
}
TOWERS = (*CLIPS, "imagereward")
TINY = (64, 2, 2, 128, 28, 14, 32)
GIB = 2**30


def main(args: Any) -> None:
    if args.topology:
        from dmdr_jax.planning.compiler import ENVIRONMENT  # nothing but a compiler

        os.environ.update(ENVIRONMENT, JAX_OPTIMIZATION_LEVEL="O0")
    import jax

    device = chip_of(args.topology) if args.topology else jax.devices()[0]
    size = args.size or ("tiny" if device.platform == "cpu" else "full")
    print(f"{device.device_kind}, jax {jax.__version__}, {size} towers in {args.dtype}, batch {args.batch}")
    print(f"{'tower':12} {'what':9} {'images/s':>9} {'ms/call':>9} {'GiB':>7} {'in use':>7}")
    rows = [row for tower in args.towers for row in measure(args, tower, size == "tiny", device)]
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"device": device.device_kind, "size": size, **vars(args), "rows": rows}, file, indent=2)


def chip_of(topology: str) -> Any:
    """A chip of a slice that is not here."""
    from dmdr_jax.planning.topology import describe_devices, parse

    return describe_devices(parse(topology))[0]


def measure(args: Any, tower: str, tiny: bool, device: Any) -> list[dict[str, Any]]:
    """Rows for scoring alone and with gradient; of a chip that is not here without times."""
    import jax
    import jax.numpy as jnp

    from dmdr_jax.rewards.memory import in_microbatches

    side = 32 if tiny else args.image_size
    score, params = make_scorer(tower, tiny, args.dtype, args.remat)
    there = jax.sharding.NamedSharding(jax.sharding.Mesh([device], ("chip",)), jax.sharding.PartitionSpec())
    images = jax.ShapeDtypeStruct((args.batch, side, side, 3), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (params, images))
    given = None if args.topology else random_like(shapes)

    def total(params: Any, images: Any) -> Any:
        return in_microbatches(lambda x: score(params, x), args.microbatch)(images).sum()

    programs = {"score": total, "gradient": jax.value_and_grad(total, argnums=1)}
    rows = []
    for what, program in programs.items():
        compiled = jax.jit(program).lower(*shapes).compile()
        seconds = math.nan
        if given is not None:
            seconds = timed(lambda: jax.block_until_ready(compiled(*given)), args.repeats)
        row = {
            "tower": tower,
            "what": what,
            "images_per_second": args.batch / seconds,
            "milliseconds": 1e3 * seconds,
            "planned_gib": planned_bytes(compiled) / GIB,
            "in_use_gib": peak_in_use() / GIB,
        }
        rows.append(row)
        numbers = [row[key] for key in ("images_per_second", "milliseconds", "planned_gib", "in_use_gib")]
        print(
            f"{tower:12} {what:9} {numbers[0]:9.2f} {numbers[1]:9.1f} {numbers[2]:7.3f} {numbers[3]:7.3f}", flush=True
        )
    return rows


def make_scorer(tower: str, tiny: bool, dtype: str, remat: bool) -> tuple[Callable[[Any, Any], Any], Any]:
    """`(params, images [b, h, w, 3]) -> scores [b]` of a tower, and its parameters as shapes."""
    import jax
    import jax.numpy as jnp

    from dmdr_jax.diffusers_io import keymap
    from dmdr_jax.models.blip import BlipConfig, ImageRewardModel
    from dmdr_jax.models.clip import ClipVisionConfig, ClipVisionModel
    from dmdr_jax.rewards.clip_reward import embed_images
    from dmdr_jax.rewards.image_reward import MAX_TOKENS, abstract_params
    from dmdr_jax.rewards.preprocess import Preprocessing

    compute = jnp.dtype(dtype)
    if tower == "imagereward":
        small = dict(image_size=32, vision_width=64, vision_layers=2, vision_heads=2, vision_hidden=128)
        small |= dict(text_width=64, text_layers=2, text_heads=2, text_hidden=128, vocab_size=100)
        network = ImageRewardModel(BlipConfig(**small) if tiny else BlipConfig(), compute, remat)
        preprocess, params = Preprocessing(network.config.image_size, resize="crop"), abstract_params(network)

        def score(params: Any, images: Any) -> Any:
            ids = jnp.ones((len(images), MAX_TOKENS), jnp.int32)
            return network.apply({"params": params}, preprocess(images), ids, ids)

    else:
        width, layers, heads, hidden, side, patch, space = TINY if tiny else CLIPS[tower]
        config = ClipVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden,
            image_size=side,
            patch_size=patch,
            projection_dim=space,
        )
        vision, preprocess = ClipVisionModel(config, compute, remat), Preprocessing(side)
        params = keymap.abstract(vision, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))

        def score(params: Any, images: Any) -> Any:
            return embed_images(vision, preprocess, params, images)[:, 0]

    return score, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, compute), params)


def random_like(shapes: Any) -> Any:
    """Small random numbers of these shapes and types, where they are wanted."""
    import jax

    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    values = [0.02 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return treedef.unflatten([jax.device_put(value, leaf.sharding) for value, leaf in zip(values, leaves)])


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def planned_bytes(compiled: Any) -> int:
    """What a compiled program holds at once: arguments, results and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def peak_in_use() -> int:
    """The most bytes the first device has had in use; 0 where it does not say."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def make_parser() -> Any:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--towers",
        nargs="+",
        choices=TOWERS,
        default=["l14", "h14", "imagereward"],
        metavar="NAME",
        help=f"which, of {', '.join(TOWERS)}",
    )
    parser.add_argument("--size", choices=("full", "tiny"), help="full on accelerators and tiny on CPUs by default")
    parser.add_argument("--batch", type=int, default=16, help="images per call")
    parser.add_argument("--microbatch", type=int, default=0, help="images at a time within a call; 0: all")
    parser.add_argument("--image-size", type=int, default=512, help="side of the images before preprocessing, pixels")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the towers")
    parser.add_argument("--remat", action="store_true", help="recompute each layer in the backward pass")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls")
    parser.add_argument("--topology", help="plan for a chip of this TPU slice, such as v5e:1x1, in place of measuring")
    parser.add_argument("--json", help="file for the numbers")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
