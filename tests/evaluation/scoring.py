"""Scorers that need no weights, and pictures for them."""

from pathlib import Path

import numpy as np
from PIL import Image

FUNCTIONS = '''
from dmdr_jax.rewards.python_reward import host_scorer

@host_scorer
def red(images, prompts):
    """Mean red, and a note of each picture that was scored."""
    with open(__file__ + ".log", "a") as log:
        log.writelines(prompt + "\\n" for prompt in prompts)
    return [float(image[..., 0].mean()) for image in images]

@host_scorer
def words(images, prompts):
    return [float(len(prompt.split())) for prompt in prompts]
'''


def write_functions(folder: Path) -> Path:
    """A file with the scorers ``red`` and ``words``."""
    file = folder / "scorers.py"
    file.write_text(FUNCTIONS)
    return file


def scored_prompts(file: Path) -> list[str]:
    """The prompts that ``red`` was asked for."""
    log = Path(f"{file}.log")
    return log.read_text().split("\n")[:-1] if log.exists() else []


def write_pictures(folder: Path, count: int, suffix: str = ".png") -> np.ndarray:
    """``count`` flat pictures; returns their red values in [0, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    reds = np.arange(count) * 10
    for i, value in enumerate(reds):
        picture = np.full((8 + i, 8, 3), 128, np.uint8)  # of several sizes
        picture[..., 0] = value
        Image.fromarray(picture).save(folder / f"{i:03d}{suffix}")
    return reds / 255


def write_prompts(file: Path, count: int) -> list[str]:
    """``count`` prompts, a line each, the i-th of i + 1 words."""
    prompts = [" ".join(["word"] * i + [f"p{i}"]) for i in range(count)]
    file.write_text("".join(prompt + "\n" for prompt in prompts))
    return prompts
