"""Models that draw without a network: for tests of everything around the drawing."""

import dataclasses
import types

import numpy as np

from dmdr_jax.evaluation import contestants, gallery

SIDE = 8


@dataclasses.dataclass
class FakeModel:
    """Draws flat pictures whose red is ``level`` plus what the prompt and the noise say."""

    level: float
    meta: dict | None = None
    side: int = SIDE

    @property
    def pipeline(self):
        fields = {"level": self.level, "side": self.side, "params": {}, "denoiser": "transformer", "student": None}
        return types.SimpleNamespace(**fields)

    @property
    def weights(self):
        return np.array([self.level])

    @property
    def size(self):
        return self.side, self.side

    def recipe(self, steps, kernel, guidance, size):
        grid = tuple(np.linspace(1, 0, (steps or 4) + 1).tolist())
        fields = {"grid": grid, "kernel": kernel or "ode", "guidance": guidance or 1.0, "initial_scale": 1.0}
        return types.SimpleNamespace(**fields, nfe=len(grid) - 1)


def install(monkeypatch, models: dict[str, FakeModel]) -> list[list[int]]:
    """Puts the models in the place of real ones, by path; returns the places of the images that get drawn, by batch."""
    drawn: list[list[int]] = []

    def draw(pipeline, weights, recipe, prompts, noise, *, places, **options):
        drawn.append(list(dict.fromkeys(places)))
        red = pipeline.level + 0.01 * np.array([len(p.split()) for p in prompts]) + 0.1 * noise
        images = np.full((len(prompts), pipeline.side, pipeline.side, 3), 0.5, np.float32)
        images[..., 0] = red[:, None, None]
        return images

    def noise(pipeline, height, width, seeds):
        return np.array([np.random.default_rng(seed).random() for seed in seeds])

    monkeypatch.setattr(contestants, "open_model", lambda path, dtype: models[path])
    monkeypatch.setattr(contestants, "image_size", lambda model, height, width, latents: (height, width))
    monkeypatch.setattr(contestants, "cut_prompts", lambda model, prompts: {"text_encoder": 0})
    monkeypatch.setattr(gallery, "draw_images", draw)
    monkeypatch.setattr(gallery, "initial_noise", noise)
    return drawn
