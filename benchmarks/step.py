"""What a training step costs: time, images per second, and the share of the device's peak, with random weights.

    python -m benchmarks.step                                  # a tiny model on a CPU, SD3-Medium at 1024 px elsewhere
    python -m benchmarks.step --size=sdxl --batch=4 --remat=full --profile
    python -m benchmarks.step --against=torch                  # beside the same step in PyTorch, on the same device

Measured are the trainer's own two compiled programs, distribution matching alone. Operations are those of the method,
by the networks' shapes: what is recomputed or padded is not credited. --profile times the parts of a step one by one,
each a program of its own, and says what is left; --trace writes a profile to look into with xprof.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import workload as work
from dmdr_jax import cli

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""bf16 operations per second of GPUs, dense; those of TPUs are in `dmdr_jax.planning.topology`."""
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}


def parser() -> Any:
    p = cli.make_parser(__doc__)
    work.add_arguments(p)
    p.add_argument("--profile", action="store_true", help="also time the parts of each step")
    p.add_argument("--trace", type=Path, help="folder for a profile of a few steps")
    p.add_argument("--against", choices=("torch",), help="also run benchmarks.torch_reference, before")
    return p


def main(args: Any) -> None:
    on_cpu = not _has_accelerator()
    workload = work.of(args, on_cpu)
    theirs = run_torch(workload, args, on_cpu) if args.against else None
    bench = Bench.make(workload)
    numbers = bench.measure(args.repeats, args.iterations)
    show(numbers)
    if args.profile:
        numbers["parts"] = bench.parts(args.repeats, args.iterations)
        show_parts(numbers)
    if args.trace:
        bench.trace(args.trace)
    if theirs is not None:
        numbers["torch"] = theirs
        numbers["ratio"] = {name: theirs[name]["seconds"] / numbers[name]["seconds"] for name in _STEPS}
        numbers["process_ratio"] = {
            name: theirs[name]["process_seconds"] / numbers[name]["process_seconds"] for name in _STEPS
        }
        print(f"\n{theirs['library']} on {theirs['device']}:")
        for name in _STEPS:
            print(f"{name:12}{theirs[name]['seconds'] * 1e3:12.1f} ms   ours is {numbers['ratio'][name]:.2f} x as fast")
    work.write(args.json, numbers)


_STEPS = ("fake", "generator", "outer")


def _has_accelerator() -> bool:
    """Whether JAX sees one; asked of another process, as this one must leave the memory to PyTorch for a while."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() not in ("", "cpu")


def run_torch(workload: work.Workload, args: Any, on_cpu: bool) -> dict[str, Any]:
    """`benchmarks.torch_reference` at the same size, in a process of its own, which is gone when ours begins."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "torch.json"
        options = {name: getattr(workload, name) for name in ("size", "batch", "pixels", "dtype", "generator", "remat")}
        options |= {"repeats": args.repeats, "iterations": args.iterations, "json": file}
        command = [sys.executable, "-m", "benchmarks.torch_reference", *(f"--{k}={v}" for k, v in options.items())]
        command += ["--device=cpu"] if on_cpu else []
        subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text(encoding="utf-8"))


@dataclasses.dataclass
class Bench:
    """The compiled updates and what they work on."""

    workload: work.Workload
    run: Any
    layout: Any
    state: Any
    frozen: Any
    batch: Any

    @classmethod
    def make(cls, workload: work.Workload) -> "Bench":
        import jax

        from dmdr_jax.training import setup
        from dmdr_jax.training.layout import Layout

        layout = Layout.make(-1, 1)
        layout.check_batch(workload.batch)
        run = work.abstract_run(workload, layout.mesh)
        base = layout.replicate(work.base_weights(run.frozen.base))
        size = run.plan.image_size
        uncond = layout.replicate(work.conditioning(run.frozen.uncond, size, 3))
        batch = layout.put_batch(work.conditioning(run.batch.cond, size, 2))
        frozen = run.frozen.replace(base=base, uncond=uncond)
        make = partial(setup.make_state, workload.config(), run.pipeline.family, run.plan)
        where = jax.tree.map(lambda leaf: leaf.sharding, layout.abstract_state(run.state))
        return cls(
            workload, run, layout, jax.jit(make, out_shardings=where)(base), frozen, run.batch.replace(cond=batch)
        )

    def programs(self) -> dict[str, Any]:
        """Both updates, not yet compiled."""
        from dmdr_jax.training.programs import fake_program, generator_program

        fake = fake_program(self.run.plan, self.layout, self.state)
        return {"fake": fake, "generator": generator_program(self.run.plan, self.terms, self.layout, self.state)}

    @property
    def terms(self) -> tuple[Any, ...]:
        from dmdr_jax.objectives.base import active_terms

        return active_terms(self.run.terms, 0)

    def measure(self, repeats: int, iterations: int) -> dict[str, Any]:
        """Seconds of both updates, operations, and the share of the peak of all devices used."""
        import jax

        batch, device = self.workload.batch, jax.devices()[0]
        peak = _peak(device.device_kind)
        flops = operations(self.workload)
        numbers: dict[str, Any] = {
            "library": f"jax {jax.__version__}",
            "device": device.device_kind,
            "devices": self.layout.mesh.size,
            "workload": dataclasses.asdict(self.workload),
            "attention": self.run.plan.denoiser.module.attention.kind,
            "peak": peak,
        }
        for name, program in self.programs().items():
            start = time.perf_counter()
            compiled = program.lower(self.state, self.frozen, self.batch).compile()
            compiling = time.perf_counter() - start
            found = work.summary(work.clocked(partial(self._steps, compiled), repeats, iterations), batch)
            numbers[name] = found | {"compile_seconds": compiling} | self._speed(flops[name], found["seconds"], peak)
            memory = compiled.memory_analysis()
            if memory is not None:
                numbers[name]["temporary_bytes"] = memory.temp_size_in_bytes
        total = work.outer(numbers["fake"], numbers["generator"], batch)
        done = flops["generator"] + work.FAKE_UPDATES * flops["fake"]
        numbers["outer"] = total | self._speed(done, total["seconds"], peak)
        return numbers

    def _steps(self, compiled: Any, count: int) -> None:
        """So many updates, which follow each other without waiting, as in training."""
        import jax

        for _ in range(count):
            self.state, _ = compiled(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)

    def _speed(self, flops: float, seconds: float, peak: float | None) -> dict[str, Any]:
        rate = flops / seconds / self.layout.mesh.size
        return {"flops": flops, "flops_per_second": rate, "share_of_peak": rate / peak if peak else None}

    def parts(self, repeats: int, iterations: int) -> dict[str, dict[str, Any]]:
        """Each part of the updates as a program of its own, by step and part."""
        import jax

        peak, found = _peak(jax.devices()[0].device_kind), {}
        for step, parts in pieces(self.run.plan, self.state, self.frozen, self.batch).items():
            for name, (function, arguments) in parts.items():
                program = jax.jit(self.layout.on_mesh(function)).lower(*arguments).compile()
                clocked = work.clocked(partial(_calls, program, arguments), repeats, iterations)
                times = work.summary(clocked, self.workload.batch)
                speed = self._speed(_count(function, arguments), times["seconds"], peak)
                found.setdefault(step, {})[name] = times | speed
        return found

    def trace(self, folder: Path) -> None:
        """A profile of three steps of each kind."""
        import jax

        compiled = {n: p.lower(self.state, self.frozen, self.batch).compile() for n, p in self.programs().items()}
        with jax.profiler.trace(str(folder)):
            for name, program in compiled.items():
                for i in range(3):
                    with jax.profiler.StepTraceAnnotation(name, step_num=i):
                        self.state, _ = program(self.state, self.frozen, self.batch)
                jax.block_until_ready(self.state)


def _calls(program: Any, arguments: tuple, count: int) -> None:
    import jax

    for _ in range(count):
        out = program(*arguments)
    jax.block_until_ready(out)


def operations(workload: work.Workload) -> dict[str, float]:
    """Operations of both updates as the method has them: nothing recomputed, nothing padded."""
    from dmdr_jax.objectives.base import active_terms
    from dmdr_jax.training.step import fake_step, generator_step

    run = work.abstract_run(workload, remat="none", attention="plain")
    inputs, terms = (run.state, run.frozen, run.batch), active_terms(run.terms, 0)
    return {
        "fake": _count(partial(fake_step, run.plan), inputs),
        "generator": _count(partial(generator_step, run.plan, terms), inputs),
    }


def _count(function: Callable, arguments: Any) -> float:
    import jax

    from dmdr_jax.planning.work import count

    return count(jax.make_jaxpr(function)(*arguments))


Part = tuple[Callable, tuple]


def pieces(plan: Any, state: Any, frozen: Any, batch: Any) -> dict[str, dict[str, Part]]:
    """The parts of the two updates by step and name: functions and what they are called with."""
    import jax
    import jax.numpy as jnp

    from dmdr_jax.diffusion.denoiser import Weights
    from dmdr_jax.training.fake import apply_gradients
    from dmdr_jax.training.plan import generator_weights
    from dmdr_jax.training.scoring import Scorer
    from dmdr_jax.training.state import ema_update

    cond, rows = batch.cond, batch.cond.batch
    z, t = jnp.ones((rows, *plan.latent_shape)), jnp.full((rows,), 0.5)

    def rollout(generator: Any, frozen: Any, cond: Any, with_sample: bool) -> Any:
        student, noise = generator_weights(plan, generator, frozen.base), jnp.ones((rows, *plan.latent_shape))
        process, key = plan.denoiser.process, jax.random.key(0)

        def call(z: Any, t: Any) -> Any:
            return plan.denoiser.output(student, z, t, cond)

        given = plan.simulation.student_input(call, process, noise, key, with_sample)
        return given.simulated if with_sample else given.z

    def student(generator: Any, frozen: Any, cond: Any, z: Any) -> Any:
        weights = generator_weights(plan, generator, frozen.base)
        return (plan.denoiser.x0(weights, z, t, cond) ** 2).mean()

    def fake(delta: Any, frozen: Any, cond: Any, z: Any) -> Any:
        return (plan.denoiser.output(Weights(frozen.base, delta, plan.fake_scale), z, t, cond) ** 2).mean()

    def scores(delta: Any, frozen: Any, cond: Any, z: Any) -> Any:
        return Scorer.at(plan, frozen, delta, state.step).scores(z, t, cond)

    def optimise(tx: Any, params: Any, moments: Any, ema: Any) -> Any:
        new, moments, _ = apply_gradients(tx, params, moments, params)
        return new, moments, ema if ema is None else ema_update(ema, new, plan.ema_decay)

    shared, networks = (frozen, cond, z), (state.generator, frozen, cond)
    generator_moments = state.generator, state.generator_opt, state.ema
    return {
        "fake": {
            "rollout with its samples": (partial(rollout, with_sample=True), networks),
            "fake score forward and backward": (jax.grad(fake), (state.fake, *shared)),
            "AdamW": (partial(optimise, plan.fake_tx), (state.fake, state.fake_opt, None)),
        },
        "generator": {
            "rollout": (partial(rollout, with_sample=False), networks),
            "student forward and backward": (jax.grad(student), (state.generator, *shared)),
            "scores, one pass of 3 rows an image": (scores, (state.fake, *shared)),
            "AdamW and EMA": (partial(optimise, plan.generator_tx), generator_moments),
        },
    }


def _peak(kind: str) -> float | None:
    """bf16 operations per second of a device; None where unknown."""
    from dmdr_jax.planning.topology import CHIPS

    if kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[kind]].flops
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def show(numbers: dict[str, Any]) -> None:
    workload = numbers["workload"]
    print(f"{workload} on {numbers['devices']} x {numbers['device']}, {numbers['library']}")
    print(f"attention of a thousand tokens and more: {numbers['attention']}\n")
    print(f"{'step':12}{'ms':>10}{'images/s':>12}{'TFLOP':>10}{'TFLOP/s':>10}{'of peak':>10}")
    for name in _STEPS:
        print(f"{name:12}" + _line(numbers[name], numbers[name]["images_per_second"]))
    print(f"(outer: a generator step and {work.FAKE_UPDATES} fake steps; TFLOP/s of one device)")


def _line(found: dict[str, Any], images: float) -> str:
    share = _share(found["share_of_peak"])
    speed = found["flops"] / 1e12, found["flops_per_second"] / 1e12
    return f"{1e3 * found['seconds']:10.1f}{images:12.2f}{speed[0]:10.3g}{speed[1]:10.3g}{share:>10}"


def show_parts(numbers: dict[str, Any]) -> None:
    print(f"\n{'part':48}{'ms':>10}{'of step':>10}{'TFLOP/s':>10}{'of peak':>10}")
    for step, parts in numbers["parts"].items():
        whole = numbers[step]["seconds"]
        for name, found in parts.items():
            share, rate = _share(found["share_of_peak"]), found["flops_per_second"] / 1e12
            seconds = found["seconds"]
            print(f"{step + ': ' + name:48}{1e3 * seconds:10.1f}{_share(seconds / whole):>10}{rate:10.3g}{share:>10}")
        rest = whole - sum(found["seconds"] for found in parts.values())
        print(f"{step + ': the rest':48}{1e3 * rest:10.1f}{_share(rest / whole):>10}")


def _share(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"


if __name__ == "__main__":
    cli.run(main, parser())
