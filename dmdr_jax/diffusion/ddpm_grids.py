"""Time grids of the variance preserving process, and the diffusers schedulers that visit them.

Times are those of `dmdr_jax.diffusion.process.VariancePreserving`, t = (k + 1) / K for training step k.

**Teachers** are drawn as diffusers' ``EulerDiscreteScheduler`` does, SDXL's own: it steps the probability
flow ODE in ``x / alpha`` over ``sigma / alpha``, which is the kernel ``ode``. Its spacings "linspace" and
"trailing" start from ``sigma`` instead of 1 times the noise (`initial_scale`).

**Students** draw with ``LCMScheduler`` when they renoise (kernel ``renoise``) and with the Euler scheduler
when they follow the ODE, given their timesteps explicitly. LCM mixes a share of the input into the last
estimate, ``0.25 / ((10 k)^2 + 0.25)``: below 2e-6 from k = 39 on, so that it can be left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmdr_jax.diffusion.process import Process, VariancePreserving
from dmdr_jax.errors import UserError

EULER = "EulerDiscreteScheduler"
LCM = "LCMScheduler"
SPACINGS = ("leading", "trailing", "linspace")

# Settings under which the Euler scheduler draws on another grid, with the one value that is known here.
_FIXED: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}
_NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def euler_grid(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """The times at which diffusers' Euler scheduler calls the network, and the final 0: ``[steps + 1]`` float32.

    Other schedulers' folders are drawn on this grid too, with their own spacing.

    Raises:
      UserError: the configuration asks for a grid that is not known here.
    """
    if steps < 1:
        raise UserError("a sampler needs at least 1 step.")
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"the scheduler setting {key}={config[key]!r} is not supported; set it to {value!r}.")
    train_steps = config.get("num_train_timesteps", 1000)
    if steps > train_steps:
        raise UserError(f"{steps} sampler steps are more than the {train_steps} that the model was trained on.")
    timesteps = _timesteps(_spacing(config), train_steps, steps, config.get("steps_offset", 0))
    return np.append((timesteps + 1) / train_steps, 0.0).astype(np.float32)


def initial_scale(config: Mapping[str, Any], process: Process, start: float) -> float:
    """What the Euler scheduler multiplies standard normal noise by at the time ``start``."""
    if config.get("_class_name", EULER) != EULER or _spacing(config) == "leading":
        return 1.0
    return float(process.coefficients(np.float32(start))[1])  # type: ignore[arg-type]


def timesteps_of(process: VariancePreserving, grid: Sequence[float]) -> list[int]:
    """The training steps k of a grid's network calls."""
    return [round(float(t) * process.train_steps) - 1 for t in grid[:-1]]


def student_scheduler(base_config: Mapping[str, Any], timesteps: Sequence[int], stochastic: bool) -> dict[str, Any]:
    """The configuration of the scheduler that draws a student: LCM where it renoises, else Euler.

    Its call is ``pipe(..., timesteps=[...])``; a student on equidistant steps is LCM's default of that many, too.
    """
    noise = {key: base_config[key] for key in _NOISE_KEYS if key in base_config}
    if not stochastic:
        spacing = {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "zero"}
        return {"_class_name": EULER, **noise, **spacing}
    train_steps, n = base_config.get("num_train_timesteps", 1000), len(timesteps)
    equidistant = [train_steps // n * (n - i) - 1 for i in range(n)] == list(timesteps)
    original = n if equidistant else 50
    fixed = {"clip_sample": False, "set_alpha_to_one": True, "thresholding": False, "timestep_scaling": 10.0}
    return {"_class_name": LCM, **noise, **fixed, "original_inference_steps": original}


def _spacing(config: Mapping[str, Any]) -> str:
    spacing = config.get("timestep_spacing", "linspace")
    if spacing not in SPACINGS:
        raise UserError(f"the scheduler's timestep_spacing is {spacing!r}; supported are {', '.join(SPACINGS)}.")
    return spacing


def _timesteps(spacing: str, train_steps: int, steps: int, offset: int) -> np.ndarray:
    """Descending, in the arithmetic of diffusers (Lin et al. 2024, table 2)."""
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        return (np.arange(steps) * (train_steps // steps))[::-1].astype(np.float64) + offset
    return np.arange(train_steps, 0, -train_steps / steps).round() - 1.0
