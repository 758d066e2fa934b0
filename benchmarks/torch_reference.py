"""The training step written plainly in PyTorch, with diffusers' networks and PEFT's adapters.

    python -m benchmarks.torch_reference                                  # a tiny model on a CPU, SD3-Medium on a GPU
    python -m benchmarks.torch_reference --size=sdxl --batch=2 --remat=full

The authors' way: the student is one network, the scores are another whose adapter, the fake score's, is turned up for
the fake score and down for the real one, and the three scores (real with the prompt, real without, fake) are three
passes. Autocast to bfloat16, fp32 adapters, fused AdamW, PyTorch's own attention, and no compilation.

`benchmarks.step` runs this beside the JAX step; `tests/test_benchmarks.py` holds the two to equal losses and gradients.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks import workload as work
from dmdr_jax import cli

STUDENT, FAKE = "generator", "fake"


def parser() -> Any:
    p = cli.make_parser(__doc__)
    work.add_arguments(p)
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    return p


def main(args: Any) -> None:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workload = work.of(args, on_cpu=device == "cpu")
    numbers = measure(workload, device, args.repeats, args.iterations)
    for name in ("fake", "generator", "outer"):
        one = numbers[name]
        print(f"{name:10} {one['seconds'] * 1e3:10.1f} ms {one['images_per_second']:10.2f} images/s")
    work.write(args.json, numbers)


def measure(workload: work.Workload, device: str, repeats: int, iterations: int) -> dict[str, Any]:
    """Seconds of both updates, in this process."""
    import diffusers
    import torch

    run = work.abstract_run(workload)
    step = Step(run, workload, device)
    randomness = np.random.default_rng(1)

    def timed(update: Any) -> dict[str, Any]:
        def steps(count: int) -> None:
            for _ in range(count):
                update(draw(run, step, randomness))
            step.wait()

        return work.summary(work.clocked(steps, repeats, iterations), workload.batch)

    fake, generator = timed(step.fake_update), timed(step.generator_update)
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "library": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        "device": where,
        "workload": dataclasses.asdict(workload),
        "fake": fake,
        "generator": generator,
        "outer": work.outer(fake, generator, workload.batch),
        "memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


@dataclasses.dataclass
class Draws:
    """The random numbers of one update.

    Attributes:
      noise: where the rollout starts ``[b, c, h, w]``.
      steps: noise of its steps ``[K, b, c, h, w]``.
      index: step of each row's input ``[b]``.
      tau, renoise: of the scores, ``[b]`` and ``[b, c, h, w]``.
      guidance: of the real score.
    """

    noise: Any
    steps: Any
    index: Any
    tau: Any
    renoise: Any
    guidance: float


def draw(run: Any, step: "Step", randomness: np.random.Generator) -> Draws:
    """Fresh random numbers, distributed as in training at its first step."""
    import torch

    h, w, c = run.plan.latent_shape
    shape, steps = (step.batch, c, h, w), run.plan.simulation.steps
    normal = functools.partial(torch.randn, device=step.device, dtype=torch.float32)
    tau = np.clip(randomness.beta(4.0, 1.5, step.batch), run.plan.renoise.low, run.plan.renoise.high)
    index = torch.as_tensor(randomness.integers(0, steps, step.batch), device=step.device)
    jitter = run.plan.guidance_jitter * randomness.uniform(-1, 1)
    return Draws(
        normal(shape),
        normal((steps, *shape)),
        index,
        torch.as_tensor(step.process.snap(tau.astype(np.float32)), device=step.device),
        normal(shape),
        run.plan.guidance + jitter,
    )


class Flow:
    """SD3: x_t = (1 - t) x0 + t noise, and the network says noise - x0."""

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        return 1 - t, t

    def snap(self, t: np.ndarray) -> np.ndarray:
        return t

    def timestep(self, t: Any) -> Any:
        return 1000 * t

    def x0(self, z: Any, output: Any, t: Any) -> Any:
        return z - rows(t) * output

    def target(self, x0: Any, noise: Any) -> Any:
        return noise - x0


class Ddpm:
    """SDXL: x_t = sqrt(abar_k) x0 + sqrt(1 - abar_k) noise with k = 1000 t - 1, and the network says the noise."""

    def __init__(self, scheduler: dict[str, Any], device: str):
        import torch
        from diffusers import DDPMScheduler

        abar = DDPMScheduler.from_config(scheduler).alphas_cumprod.double()
        self.abar = torch.cat([torch.ones(1, dtype=abar.dtype), abar]).float().to(device)

    def coefficients(self, t: Any) -> tuple[Any, Any]:
        abar = self.abar[(1000 * t).round().long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def snap(self, t: np.ndarray) -> np.ndarray:
        return (np.clip(np.round(1000 * t - 1), 0, 999) + 1) / np.float32(1000)

    def timestep(self, t: Any) -> Any:
        return (1000 * t).round() - 1

    def x0(self, z: Any, output: Any, t: Any) -> Any:
        alpha, sigma = map(rows, self.coefficients(t))
        return (z - sigma * output) / alpha

    def target(self, x0: Any, noise: Any) -> Any:
        return noise


def rows(x: Any) -> Any:
    """``[b]`` to ``[b, 1, 1, 1]``."""
    return x[:, None, None, None]


class Step:
    """Both updates and what they change."""

    def __init__(self, run: Any, workload: work.Workload, device: str):
        import torch

        config, plan = workload.config(), run.plan
        self.device, self.batch, self.plan = device, workload.batch, plan
        self.half = workload.dtype == "bfloat16"
        pipeline = run.pipeline
        self.is_sdxl = pipeline.denoiser == "unet"
        self.process = Ddpm(dict(pipeline.scheduler), device) if self.is_sdxl else Flow()
        self.cond, self.uncond = prompts(run, device)
        build = functools.partial(network, run, workload, device)
        self.student, self.score = build(), build()
        if workload.generator == "lora":
            adapt(self.student, STUDENT, config.generator.lora, pipeline.family)
            set_scale(self.student, STUDENT, plan.generator_lora_scale)
        else:
            self.student.float().requires_grad_(True)
        adapt(self.score, FAKE, config.fake.lora, pipeline.family)
        self.trained = [[p for p in net.parameters() if p.requires_grad] for net in (self.student, self.score)]
        self.ema = [p.detach().clone() for p in self.trained[0]]
        make = functools.partial(torch.optim.AdamW, betas=(config.optim.b1, config.optim.b2), fused=device == "cuda")
        rates = config.optim.generator, config.optim.fake
        self.optimisers = [make(p, lr=r.lr, weight_decay=r.weight_decay) for p, r in zip(self.trained, rates)]
        self.clip = config.optim.clip

    def wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def x0(self, net: Any, z: Any, t: Any, cond: dict[str, Any]) -> Any:
        return self.process.x0(z, self.output(net, z, t, cond), t)

    def output(self, net: Any, z: Any, t: Any, cond: dict[str, Any]) -> Any:
        """The network's output at latents ``[b, c, h, w]`` and times ``[b]``, fp32."""
        import torch

        cast = torch.autocast(self.device, torch.bfloat16) if self.half else contextlib.nullcontext()
        with cast:
            return net(z, timestep=self.process.timestep(t), return_dict=False, **cond)[0].float()

    def simulate(self, draws: Draws, with_sample: bool) -> tuple[Any, Any, Any]:
        """The student's inputs among the states of its own sampler, their times, and its samples there."""
        import torch

        grid = torch.tensor(self.plan.simulation.grid, device=self.device)
        z, states, samples = draws.noise, [], []
        with torch.no_grad():
            for i in range(len(grid) - 1):
                states.append(z)
                if i == len(grid) - 2 and not with_sample:
                    break
                samples.append(self.x0(self.student, z, grid[i].expand(self.batch), self.cond))
                alpha, sigma = self.process.coefficients(grid[i + 1].expand(self.batch))
                z = rows(alpha) * samples[-1] + rows(sigma) * draws.steps[i]
        every = torch.arange(self.batch, device=self.device)
        sample = torch.stack(samples)[draws.index, every] if with_sample else None
        return torch.stack(states)[draws.index, every], grid[draws.index], sample

    def renoised(self, x0: Any, draws: Draws) -> Any:
        alpha, sigma = self.process.coefficients(draws.tau)
        return rows(alpha) * x0 + rows(sigma) * draws.renoise

    def fake_update(self, draws: Draws) -> Any:
        """One update of the fake score on fresh samples; returns its loss."""
        _, _, samples = self.simulate(draws, with_sample=True)
        set_scale(self.score, FAKE, self.plan.fake_scale)
        output = self.output(self.score, self.renoised(samples, draws), draws.tau, self.cond)
        loss = ((output - self.process.target(samples, draws.renoise)) ** 2).mean()
        self.apply(1, loss)
        return loss.detach()

    def generator_update(self, draws: Draws) -> tuple[Any, Any]:
        """One update of the student; returns its loss and the distribution matching gradient."""
        import torch

        z, t, _ = self.simulate(draws, with_sample=False)
        x0 = self.x0(self.student, z, t, self.cond)
        with torch.no_grad():
            x_tau = self.renoised(x0, draws)
            set_scale(self.score, FAKE, self.plan.fake_scale)
            fake = self.x0(self.score, x_tau, draws.tau, self.cond)
            set_scale(self.score, FAKE, self.plan.dg_initial)
            real_cond = self.x0(self.score, x_tau, draws.tau, self.cond)
            real_uncond = self.x0(self.score, x_tau, draws.tau, self.uncond)
            real = real_uncond + draws.guidance * (real_cond - real_uncond)
            normaliser = (x0 - real).abs().mean((1, 2, 3), keepdim=True) + self.plan.normaliser_floor
            gradient = (fake - real) / normaliser
        loss = 0.5 * ((x0 - (x0 - gradient).detach()) ** 2).mean()
        self.apply(0, loss)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.trained[0]], 1 - self.plan.ema_decay)
        return loss.detach(), gradient

    def apply(self, which: int, loss: Any) -> None:
        """Backward pass, clipping, AdamW."""
        import torch

        self.optimisers[which].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained[which], self.clip)
        self.optimisers[which].step()


def network(run: Any, workload: work.Workload, device: str) -> Any:
    """The frozen denoiser with the benchmark's weights."""
    import diffusers
    import torch

    name = run.pipeline.denoiser
    kind = {"unet": diffusers.UNet2DConditionModel, "transformer": diffusers.SD3Transformer2DModel}[name]
    with torch.device("meta"):
        net = kind.from_config({k: v for k, v in run.pipeline.configs[name].items() if not k.startswith("_")})
    dtype = getattr(torch, workload.dtype)
    state = {
        key: torch.from_numpy(work.weight(key, tuple(value.shape))).to(dtype) for key, value in net.state_dict().items()
    }
    net.load_state_dict(state, assign=True)
    net.to(device).requires_grad_(False)
    if workload.remat != "none":
        net.enable_gradient_checkpointing()
        net.train()  # checkpoints are set in training mode alone; there is no dropout
    return net


def prompts(run: Any, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the network for the batch's prompts and for the absent one."""
    import torch

    found = []
    for seed, abstract in ((2, run.batch.cond), (3, run.frozen.uncond)):
        cond = work.conditioning(abstract, run.plan.image_size, seed)
        batch = run.batch.cond.prompt_embeds.shape[0]
        tensors = {
            name: torch.from_numpy(np.asarray(value, np.float32)).to(device).expand(batch, *value.shape[1:])
            for name in ("prompt_embeds", "pooled", "time_ids")
            if (value := getattr(cond, name)) is not None
        }
        arguments = {"encoder_hidden_states": tensors["prompt_embeds"]}
        if "time_ids" in tensors:
            added = {"text_embeds": tensors["pooled"], "time_ids": tensors["time_ids"]}
            arguments["added_cond_kwargs"] = added
        else:
            arguments["pooled_projections"] = tensors["pooled"]
        found.append(arguments)
    return found[0], found[1]


def adapt(net: Any, name: str, settings: Any, family: str) -> None:
    """A PEFT adapter on the modules that ours adapts; its parameters are fp32."""
    from peft import LoraConfig

    from dmdr_jax.training.setup import lora_config

    ours = lora_config(settings, family)
    pattern = "|".join(f"(?:{target})" for target in ours.targets)
    net.add_adapter(LoraConfig(r=ours.rank, lora_alpha=ours.alpha, target_modules=pattern), adapter_name=name)
    for key, parameter in net.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def set_scale(net: Any, name: str, scale: float) -> None:
    """The effective scale of an adapter, alpha / rank included."""
    for module in net.modules():
        if name in getattr(module, "scaling", {}):
            module.scaling[name] = scale


if __name__ == "__main__":
    cli.run(main, parser())
