"""How images look as such, whatever they show: what rewards that are pushed too far change first.

Reward-driven generators drift towards saturated, contrasty, clipped pictures. None of these numbers is good or bad;
their difference from the teacher's on the same prompts and noise is what to watch.
"""

import numpy as np

from dmdr_jax.shapes.render import chroma, oklab

SIDE = 256  # pixels of the longer side, about, that the averages are taken over
MEASURES = ("chroma", "saturation", "contrast", "clipped")


def appearance(image: np.ndarray) -> dict[str, float]:
    """Measures of a picture, uint8 ``[h, w, 3]``.

    Returns:
      chroma: mean OKLab chroma, sqrt(a^2 + b^2).
      saturation: mean HSV saturation, (max - min) / max, 0 for black.
      contrast: standard deviation of OKLab lightness.
      clipped: share of the pixels with a channel at 0 or 255.
    """
    clipped = ((image == 0) | (image == 255)).any(-1).mean()
    pixels = _thinned(image)
    lab = oklab(pixels)
    high, low = pixels.max(-1), pixels.min(-1)
    saturation = np.where(high > 0, (high - low) / np.maximum(high, 1e-6), 0.0)
    values = (chroma(lab).mean(), saturation.mean(), lab[..., 0].std(), clipped)
    return {name: float(value) for name, value in zip(MEASURES, values)}


def mean_colour(image: np.ndarray) -> np.ndarray:
    """OKLab colour ``[3]`` of a picture, uint8 ``[h, w, 3]``, seen from afar.

    How far the images of one prompt lie apart in it is their palette: rewards often settle on one background and one
    light, whatever the picture shows, which features of its content do not notice.
    """
    return oklab(_thinned(image)).reshape(-1, 3).mean(0)


def _thinned(image: np.ndarray) -> np.ndarray:
    step = max(1, round(max(image.shape[:2]) / SIDE))
    return image[::step, ::step].astype(np.float32) / 255
