"""Pictures for the report, as data URIs: nothing to load from elsewhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from dmdr_jax.evaluation.results import IMAGES_FILE

PER_TAG = 4  # prompts shown of each task
PLAIN_COUNT = 16  # prompts shown where there are no tasks
MAX_SIDE = 256  # pixels; larger pictures are reduced
SMALL_SIDE = 96  # up to this side pixels are shown as squares
MAX_COLUMNS = 4
MAX_PROMPT = 240  # letters of a prompt on a card
JPEG_QUALITY = 88
PREVIEWS = 3  # grids of the student shown, first to last


def data_uri(picture: np.ndarray | Image.Image, max_side: int = MAX_SIDE) -> str:
    """uint8 ``[h, w, 3]`` or an image as a data URI, reduced to ``max_side`` pixels: a PNG, or a JPEG if it was."""
    image = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert("RGB")
    reduced = max(image.size) > max_side
    if reduced:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    kind, options = ("jpeg", {"quality": JPEG_QUALITY}) if reduced else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


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


class Pictures:
    """The images of an evaluation, wherever they are kept: in `IMAGES_FILE`, or as files in the models' galleries.

    Attributes:
      models: which stand side by side, see `shown_models`.
      index: the prompts that have an image of each of them.
    """

    def __init__(self, folder: Path, results: Mapping[str, Any]):
        self._folder, self._results = folder, results
        self.models = shown_models(results)
        self._arrays: dict[str, np.ndarray] = {}
        in_galleries = all("gallery" in results["models"][m] for m in self.models)
        if (folder / IMAGES_FILE).is_file() and not in_galleries:  # else it is another evaluation's
            with np.load(folder / IMAGES_FILE) as stored:
                self._arrays = {name: stored[name] for name in stored.files}
        self.index = self._arrays["index"].tolist() if self._arrays else self._in_galleries() if in_galleries else []
        self._places = {i: position for position, i in enumerate(self.index)}

    def __contains__(self, i: int) -> bool:
        return i in self._places

    def get(self, model: int, i: int) -> np.ndarray | Image.Image:
        """A model's image of prompt i."""
        if self._arrays:
            return self._arrays[f"model_{model}"][self._places[i]]
        with Image.open(self._file(model, i)) as image:
            return image.convert("RGB")

    @property
    def card_width(self) -> int:
        """Pixels that a card of the models side by side needs at least."""
        return 82 * len(self.models) + 40

    def _file(self, model: int, i: int) -> Path:
        row = self._results["models"][model]
        return self._folder / row["gallery"] / row["files"][i]

    def _in_galleries(self) -> list[int]:
        rows = range(len(self._results["prompts"]))
        return [i for i in rows if all(self._file(m, i).is_file() for m in self.models)]


def side_by_side(folder: Path, results: Mapping[str, Any]) -> str:
    """One card per prompt with every model's image from the same noise; empty where the images are gone."""
    found = Pictures(folder, results)
    chosen = [found.index[position] for position in chosen_prompts(results["prompts"], found.index)]
    cards = [card(results, found, i) for i in chosen]
    return f'<div class="cards" style="--card-width: {found.card_width}px">{"".join(cards)}</div>' if cards else ""


def card(results: Mapping[str, Any], found: Pictures, i: int, note: str = "") -> str:
    """The models' images of prompt i."""
    prompt = results["prompts"][i]["prompt"]
    cells = []
    for m in found.models:
        model = results["models"][m]
        mark = verdict_mark(model["images"][i].get("strict"))
        picture = img(found.get(m, i), f"{model['name']}: {prompt}")
        cells.append(f"<div>{picture}<span>{mark}{escape(model['name'])}</span></div>")
    trio = f'<div class="trio">{"".join(cells)}</div>'
    noted = f"<b>{escape(note)}</b> " if note else ""
    return f'<figure class="card"><figcaption>{noted}{escape(shortened(prompt))}</figcaption>{trio}</figure>'


def shortened(prompt: str) -> str:
    """A prompt as far as a card has room for it."""
    return prompt if len(prompt) <= MAX_PROMPT else prompt[: MAX_PROMPT - 1].rstrip() + "…"


def verdict_mark(strict: bool | None) -> str:
    """A tick or a cross for the strict verdict; nothing where there is none."""
    if strict is None:
        return ""
    return '<b class="good" title="passes">✓</b> ' if strict else '<b class="bad" title="fails">✗</b> '


def previews(samples: epath.Path) -> str:
    """The run's own sample grids: the teacher's, and the student's from the first to the latest."""
    grids = sorted(samples.glob("student_*.png"))
    picked = sorted({round(i) for i in np.linspace(0, len(grids) - 1, min(PREVIEWS, len(grids)))})
    files = [(samples / "teacher.png", "teacher, many steps with guidance")]
    files += [(grids[i], f"student at step {int(grids[i].stem.split('_')[1])}") for i in picked]
    return strip(files)


def strip(files: Sequence[tuple[epath.Path, str]]) -> str:
    """Pictures below one another, each with what it is; those that are not there are left out."""
    figures = []
    for file, text in files:
        try:
            with Image.open(io.BytesIO(file.read_bytes())) as image:
                picture = img(image, text, max_side=1100, pixelated=max(image.size) < 600)
        except OSError:  # not drawn yet, or being written at this moment
            continue
        figures.append(f"<figure><figcaption>{escape(text)}</figcaption>{picture}</figure>")
    return f'<div class="strip">{"".join(figures)}</div>' if figures else ""
