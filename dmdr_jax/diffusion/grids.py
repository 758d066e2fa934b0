"""Time grids of the flow process: the scheduler's for teachers, the student's, and the bridge between.

A grid is the list of noise levels ``sigma_0 = 1 > sigma_1 > .. > sigma_N`` that a sampler visits, the
network being called at the first N. Everything is numpy, computed in float64 where PyTorch's own
rounding does not matter, and returned as float32.

**The time shift** (Esser et al. 2024, eq. 23) is ``shift(u, s) = s u / (1 + (s - 1) u)``. A student
is trained on ``shift(1 - i/N, S)``: for N = 4 and S = 3, ``[1, .9, .75, .5, 0]``.

**What diffusers draws by default** with ``FlowMatchEulerDiscreteScheduler(shift=s)`` and N steps is
not that grid: its smallest training noise level is shifted already,

    sigma_min = shift(1/1000, s),                                                              (1)

N equidistant values ``v_i = 1 - c i``, ``c = (1 - sigma_min) / (N - 1)``, are shifted *again*, and a
0 is appended. For N = 4 and s = 3 this gives ``[1, .858, .602, .009, 0]``: the last call is wasted.
A set ``shift_terminal = T`` then stretches ``1 - sigma`` so that the last value is T.

**A scheduler that draws the student's grid.** A shifted equidistant grid is a Moebius function of i,

    1 - shift(1 - k i, S) = k i / (S - (S - 1) k i),  so  i / (1 - sigma_i) = S/k - (S - 1) i,   (2)

a straight line in i. Diffusers' values before the stretch are (2) with (s, c) for (S, k), and the
stretch by T divides ``1 - sigma`` by a constant, f, so that the line is multiplied by it:

    f (s/c - (s - 1) i) = A - B i,   A = S/k,  B = S - 1                                        (3)

for the grid wanted. Hence ``s/(s - 1) = c A/B``, that is

    s = c A / (c A - B),   T = sigma_{N-1},                                                     (4)

where c depends on s through (1); iterating (4) from s = 1 converges in a few rounds. So *every* grid
whose ``i / (1 - sigma_i)`` is a line (any S, and any grid of one or two steps) is the default grid of some
scheduler configuration: `scheduler_config_for` finds it, checks it, and returns None for other
grids, which diffusers draws only when given ``sigmas=`` (`explicit_sigmas`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmdr_jax.diffusion.process import Process
from dmdr_jax.errors import UserError

AUTHORS_LAST = 1e-3
"""Where the grid of the DMDR release ends (before the shift), instead of at 0."""

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# The scheduler's defaults for keys that a folder may leave out (diffusers 0.42).
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
_GRID_TOLERANCE = 1e-6
_FIXED_POINT_ROUNDS = 60


def shift(u: Any, s: float) -> Any:
    """``s u / (1 + (s - 1) u)``: moves times towards noise for s > 1; keeps 0 and 1."""
    return s * u / (1 + (s - 1) * u)


def unshift(sigma: Any, s: float) -> Any:
    """The inverse of `shift`."""
    return shift(sigma, 1 / s)


def student_grid(steps: int, shift_factor: float) -> np.ndarray:
    """``shift(1 - i/steps, S)`` for i = 0 .. steps: ``[steps + 1]`` float32, from 1 to 0."""
    _check_steps(steps)
    return np.asarray(shift(1 - np.arange(steps + 1) / steps, shift_factor), np.float32)


def authors_grid(steps: int, shift_factor: float) -> np.ndarray:
    """The DMDR release's grid ``shift(linspace(1, .001, steps + 1), S)``, whose last target is .001.

    The release targets .001 unshifted; every other value is shifted. ``[steps + 1]`` float32.
    """
    _check_steps(steps)
    grid = shift(np.linspace(1, AUTHORS_LAST, steps + 1), shift_factor)
    grid[-1] = AUTHORS_LAST
    return grid.astype(np.float32)


def grid_at(process: Process, timesteps: Sequence[float]) -> tuple[float, ...]:
    """The times at which the network is told these timesteps, and the final 0.

    Raises:
      UserError: they are not descending, or the network was not trained at them.
    """
    times = [process.time_of(k) for k in timesteps]
    descending = all(a > b for a, b in itertools.pairwise(times))
    if not times or not descending or not 0.0 < times[-1] <= times[0] <= 1.0:
        first = process.model_time(1.0)  # type: ignore[arg-type]  # a number does as well
        raise UserError(f"the timesteps must be descending, from {first:g} down, not {tuple(timesteps)}.")
    return (*times, 0.0)


def dynamic_mu(config: Mapping[str, Any], image_seq_len: int) -> float:
    """``mu`` of a scheduler with ``use_dynamic_shifting``: linear in the number of image tokens."""
    cfg = {**_DEFAULTS, **config}
    span = cfg["max_image_seq_len"] - cfg["base_image_seq_len"]
    slope = (cfg["max_shift"] - cfg["base_shift"]) / span
    return image_seq_len * slope + cfg["base_shift"] - slope * cfg["base_image_seq_len"]


def flow_match_euler_sigmas(
    config: Mapping[str, Any],
    steps: int | None = None,
    image_seq_len: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> np.ndarray:
    """The grid that diffusers' ``FlowMatchEulerDiscreteScheduler.set_timesteps`` makes.

    Args:
      config: ``scheduler/scheduler_config.json``.
      steps: number of network calls; may be left out where ``sigmas`` is given.
      image_seq_len: number of image tokens (latent pixels over the patch area), needed where the
        configuration shifts dynamically.
      sigmas: noise levels to start from in place of the default ones; the scheduler shifts them too.

    Returns:
      ``[steps + 1]`` float32, the last 0.

    Raises:
      UserError: a scheduler of another class, or a setting that Stable Diffusion 3 has no use for.
    """
    cfg = _complete(config)
    if sigmas is None:
        _check_steps(steps)
        assert steps is not None
        grid = np.linspace(1.0, _sigma_min(cfg), steps)
    else:
        grid = np.asarray(sigmas, np.float32)
        _check_steps(len(grid) if steps is None or steps == len(grid) else 0)
    grid = _time_shift(grid, cfg, image_seq_len)
    if cfg["shift_terminal"]:
        _check_terminal(grid)
        grid = 1 - (1 - grid) * ((1 - cfg["shift_terminal"]) / (1 - grid[-1]))
    return np.append(_respace(grid, cfg), 0.0).astype(np.float32)


def scheduler_config_for(
    grid: Sequence[float] | np.ndarray, base_config: Mapping[str, Any], stochastic: bool
) -> dict[str, Any] | None:
    """A scheduler configuration whose default call with N steps draws exactly ``grid``.

    Args:
      grid: ``[N + 1]`` noise levels from 1 down; the last must be 0 (diffusers always ends there).
      base_config: the folder's scheduler configuration; other keys are kept.
      stochastic: renoise with fresh noise at every step (the kernel ``renoise``), else Euler's ODE step.

    Returns:
      The configuration, or None where no configuration draws this grid (see `explicit_sigmas`).
    """
    wanted = np.asarray(grid, np.float64)
    if len(wanted) < 2 or wanted[0] != 1 or wanted[-1] != 0 or np.any(np.diff(wanted) >= 0):
        return None
    config = _plain(base_config, stochastic)
    solved = _solve(wanted[:-1], config["num_train_timesteps"])
    if solved is None:
        return None
    config["shift"], config["shift_terminal"] = solved
    drawn = flow_match_euler_sigmas(config, len(wanted) - 1)
    return config if np.max(np.abs(drawn - wanted)) < _GRID_TOLERANCE else None


def explicit_config(base_config: Mapping[str, Any], stochastic: bool, shift_factor: float = 1.0) -> dict[str, Any]:
    """A plain scheduler configuration to be called with ``sigmas=explicit_sigmas(grid, shift_factor)``."""
    return {**_plain(base_config, stochastic), "shift": float(shift_factor)}


def explicit_sigmas(grid: Sequence[float] | np.ndarray, shift_factor: float) -> list[float]:
    """The ``sigmas=`` argument with which a scheduler of this shift visits ``grid`` (its end left out).

    The scheduler shifts what it is given, so the shift is undone here.
    """
    return [float(u) for u in unshift(np.asarray(grid, np.float64)[:-1], shift_factor)]


def _solve(levels: np.ndarray, train_steps: int) -> tuple[float, float | None] | None:
    """(s, T) of equation (4) for the levels without the final 0, or None where (2) is not a line."""
    n = len(levels)
    if n == 1:
        return 1.0, None
    i = np.arange(1, n)
    line = i / (1 - levels[1:])
    slope = 0.0 if n == 2 else (line[0] - line[-1]) / (n - 2)
    intercept = line[0] + slope
    s = 1.0
    for _ in range(_FIXED_POINT_ROUNDS):
        c = (1 - shift(1 / train_steps, s)) / (n - 1)
        if c * intercept <= slope:
            return None
        s = c * intercept / (c * intercept - slope)
    return float(s), float(levels[-1])


def _plain(base_config: Mapping[str, Any], stochastic: bool) -> dict[str, Any]:
    """The base configuration without what would bend a grid once more."""
    overrides = {
        "use_dynamic_shifting": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "stochastic_sampling": stochastic,
    }
    return {"_class_name": _SCHEDULER, **_DEFAULTS, **base_config, **overrides}


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    name = config.get("_class_name", _SCHEDULER)
    if name != _SCHEDULER:
        raise UserError(f"the scheduler {name} is not supported for this family; use {_SCHEDULER}.")
    cfg = {**_DEFAULTS, **config}
    if cfg["invert_sigmas"]:
        raise UserError("scheduler setting invert_sigmas=true (Mochi's) is not supported; set it to false.")
    return cfg


def _check_steps(steps: int | None) -> None:
    if steps is None or steps < 1:
        raise UserError("a sampler needs at least 1 step, and as many steps as sigmas where both are given.")


def _check_terminal(grid: np.ndarray) -> None:
    if grid[-1] == 1:
        raise UserError("a scheduler with shift_terminal cannot draw a single step; use 2 or more, or pass sigmas.")


def _sigma_min(cfg: Mapping[str, Any]) -> float:
    """The smallest training noise level, in PyTorch's float32 arithmetic (equation 1)."""
    least = np.float32(1) / np.float32(cfg["num_train_timesteps"])
    if cfg["use_dynamic_shifting"]:
        return float(least)
    s = cfg["shift"]
    return float(np.float32(s) * least / (np.float32(1) + np.float32(s - 1) * least))


def _time_shift(grid: np.ndarray, cfg: Mapping[str, Any], image_seq_len: int | None) -> np.ndarray:
    if not cfg["use_dynamic_shifting"]:
        return shift(grid, cfg["shift"])
    if image_seq_len is None:
        raise UserError("a scheduler with use_dynamic_shifting needs the image size to place its steps.")
    mu = dynamic_mu(cfg, image_seq_len)
    factor = math.exp(mu) if cfg["time_shift_type"] == "exponential" else mu
    return factor / (factor + (1 / grid - 1))


def _respace(grid: np.ndarray, cfg: Mapping[str, Any]) -> np.ndarray:
    """Karras, exponential or beta spacing between the first and the last level, where asked for."""
    first, last, n = float(grid[0]), float(grid[-1]), len(grid)
    ramp = np.linspace(0, 1, n)
    if cfg["use_karras_sigmas"]:
        rho = 7.0  # Karras et al. 2022, eq. 5
        return (first ** (1 / rho) + ramp * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    if cfg["use_exponential_sigmas"]:
        return np.exp(np.linspace(math.log(first), math.log(last), n))
    if cfg["use_beta_sigmas"]:
        from scipy.stats import beta

        return last + beta.ppf(1 - ramp, 0.6, 0.6) * (first - last)
    return grid
