"""Pictures for the report, as data URIs: nothing to load from elsewhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmdr_jax.evaluation.results import IMAGES_FILE

PER_TAG = 4  # prompts shown of each task
PLAIN_COUNT = 16  # prompts shown where there are no tasks
MAX_SIDE = 256  # pixels; larger pictures are reduced
SMALL_SIDE = 96  # up to this side pixels are shown as squares
MAX_COLUMNS = 4
PREVIEWS = 3  # grids of the student shown, first to last


def data_uri(picture: np.ndarray | Image.Image, max_side: int = MAX_SIDE) -> str:
    """A PNG, uint8 ``[h, w, 3]`` or an image, as a data URI; reduced to ``max_side`` pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def img(picture: np.ndarray | Image.Image, alt: str, max_side: int = MAX_SIDE, pixelated: bool | None = None) -> str:
    """An img element; ``pixelated`` by default where the picture is small."""
    side = max(picture.size if isinstance(picture, Image.Image) else picture.shape[:2])
    small = side <= SMALL_SIDE if pixelated is None else pixelated
    kind = 'class="small" ' if small else ""
    return f'<img {kind}src="{data_uri(picture, max_side)}" alt="{escape(alt)}">'


def shown_models(results: Mapping[str, Any]) -> list[int]:
    """Which models stand side by side: the teacher, the baseline, then the others."""
    names = [m["name"] for m in results["models"]]
    order = [names.index(name) for name in results["compared_with"]]
    return (order + [i for i in range(len(names)) if i not in order])[:MAX_COLUMNS]


def chosen_prompts(prompts: Sequence[Mapping[str, Any]], index: Sequence[int]) -> list[int]:
    """Positions in ``index`` of the first different prompts of each task: nobody picked them."""
    chosen: list[int] = []
    seen: dict[str, set[str]] = {}
    for position, i in enumerate(index):
        tag, prompt = prompts[i].get("tag", ""), prompts[i]["prompt"]
        limit = PER_TAG if tag else PLAIN_COUNT
        if prompt not in seen.setdefault(tag, set()) and len(seen[tag]) < limit:
            seen[tag].add(prompt)
            chosen.append(position)
    return chosen


def side_by_side(folder: Path, results: Mapping[str, Any]) -> str:
    """One card per prompt with every model's image from the same noise; empty where the images are gone."""
    file = folder / IMAGES_FILE
    if not file.is_file():
        return ""
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    models = shown_models(results)
    width = 82 * len(models) + 40
    cards = [
        _card(results, models, arrays, position, int(arrays["index"][position]))
        for position in chosen_prompts(results["prompts"], arrays["index"])
    ]
    return f'<div class="cards" style="--card-width: {width}px">{"".join(cards)}</div>'


def _card(
    results: Mapping[str, Any], models: Sequence[int], arrays: Mapping[str, np.ndarray], position: int, index: int
) -> str:
    prompt = results["prompts"][index]["prompt"]
    cells = []
    for m in models:
        model = results["models"][m]
        mark = verdict_mark(model["images"][index].get("strict"))
        picture = img(arrays[f"model_{m}"][position], f"{model['name']}: {prompt}")
        cells.append(f"<div>{picture}<span>{mark}{escape(model['name'])}</span></div>")
    trio = f'<div class="trio">{"".join(cells)}</div>'
    return f'<figure class="card"><figcaption>{escape(prompt)}</figcaption>{trio}</figure>'


def verdict_mark(strict: bool | None) -> str:
    """A tick or a cross for the strict verdict; nothing where there is none."""
    if strict is None:
        return ""
    return '<b class="good" title="passes">✓</b> ' if strict else '<b class="bad" title="fails">✗</b> '


def previews(samples: Path) -> str:
    """The run's own sample grids: the teacher's, and the student's from the first to the latest."""
    grids = sorted(samples.glob("student_*.png"))
    picked = sorted({round(i) for i in np.linspace(0, len(grids) - 1, min(PREVIEWS, len(grids)))})
    files = [(samples / "teacher.png", "teacher, many steps with guidance")]
    files += [(grids[i], f"student at step {int(grids[i].stem.split('_')[1])}") for i in picked]
    figures = []
    for file, text in files:
        try:
            with Image.open(file) as image:
                picture = img(image, text, max_side=1100, pixelated=max(image.size) < 600)
        except OSError:  # not drawn yet, or being written at this moment
            continue
        figures.append(f"<figure><figcaption>{escape(text)}</figcaption>{picture}</figure>")
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""
