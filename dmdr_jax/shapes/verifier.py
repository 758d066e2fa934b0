"""Exact verifier of the embedded world: what objects an image shows, and whether they satisfy a prompt.

Detection, for images x in sRGB:

  1. background = median OKLab colour of the image's border;
  2. a pixel belongs to the nearest palette colour if that is nearer than COLOR_DISTANCE and nearer than the background;
  3. objects are the 8-connected components of each colour with enough pixels;
  4. an object's class is the best of a bank of templates (shape, radius, sub-pixel position) by intersection over union
     (IoU) of *coverages*: at this size a square and a circle differ by three pixels in each corner, so the share of the
     edge pixels that is covered must count. It is accepted if the IoU is high enough and leads the best template of
     every other class;
  5. junk = share of the pixels that differ from the background and lie away from every accepted object.

Verdicts follow GenEval (Ghosh et al. 2023): *lenient* is GenEval's own rule, *strict* asks for exactly the requested
objects and no junk, *partial* is a graded score in [0, 1].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from dmdr_jax.errors import UserError
from dmdr_jax.shapes.render import color_array, coverage_stamp, oklab, stamp_half
from dmdr_jax.shapes.world import World, relations_between

COLOR_DISTANCE = 0.13  # OKLab; largest distance of a pixel to the palette colour it is given
BACKGROUND_DISTANCE = 0.12  # OKLab; beyond it the border is none of the world's backgrounds
JUNK_DISTANCE = 0.08  # OKLab; pixels farther than this from the background are something
JUNK_LIMIT = 0.02  # share of the image; at most this much junk passes the guard
MIN_IOU = 0.85
MIN_LEAD = 0.02
BORDER = 2  # pixels
DILATION = 2  # pixels around an accepted object that are no junk
MIN_AREA_SHARE = 0.45  # of the world's smallest clean object

_TEMPLATE_OFFSETS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the centroid within a pixel
_TEMPLATE_SCALES = (0.92, 1.0, 1.08)  # of the world's radii
_PLANAR: np.ndarray = np.zeros((3, 3, 3), bool)  # 8-connected within a plane, never across planes
_PLANAR[1] = True


@dataclasses.dataclass(frozen=True, slots=True)
class Detection:
    """One accepted object.

    Attributes:
      shape, color: its class.
      box: (left, top, right, bottom), pixels, edges of the outermost pixels.
      area: pixels.
      iou: overlap with the best template; the confidence by which objects are ranked.
      lead: how far the IoU exceeds that of the best other class.
    """

    shape: str
    color: str
    box: tuple[float, float, float, float]
    area: int
    iou: float
    lead: float


@dataclasses.dataclass(frozen=True)
class Detections:
    """What `detect` reads off n images.

    Attributes:
      objects: per image, the accepted objects, most confident first.
      background: int [n], index into the world's backgrounds, -1 when it is none of them.
      junk_fraction: float [n], share of the image that is neither background nor an accepted object.
    """

    objects: tuple[tuple[Detection, ...], ...]
    background: np.ndarray
    junk_fraction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts on n images; all arrays are [n].

    Attributes:
      lenient: bool, GenEval's verdict; says nothing of further objects, except in `counting`, or of junk.
      strict: bool, the objects are exactly the requested ones, in the requested colors and relations, without junk.
      strict_unguarded: bool, strict without the junk guard.
      partial: float in [0, 1], mean over the clauses of the prompt.
      junk_fraction: float in [0, 1].
      background: int, index into the world's backgrounds or -1.
      objects: int, accepted objects.
      detections: what the verdicts were read from.
    """

    lenient: np.ndarray
    strict: np.ndarray
    strict_unguarded: np.ndarray
    partial: np.ndarray
    junk_fraction: np.ndarray
    background: np.ndarray
    objects: np.ndarray
    detections: Detections

    def summary(self) -> dict[str, float]:
        """Means over the images."""
        names = ("lenient", "strict", "strict_unguarded", "partial", "junk_fraction", "objects")
        return {name: float(np.mean(getattr(self, name))) for name in names}


# --- detection -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Components:
    """Connected components of all images: their label, image and color index, int [m], boxes [m, 4], areas [m]."""

    label: np.ndarray
    image: np.ndarray
    color: np.ndarray
    boxes: np.ndarray
    area: np.ndarray


@functools.cache
def _templates(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Template bank: coverage windows, float32 [t, k^2], and the class index of each, int [t] in rising order.

    The centroid of a template's coverage lies in the window's central pixel, at every combination of
    _TEMPLATE_OFFSETS; a shape's centroid is not its centre (triangle, heart).
    """
    half = stamp_half(world) + 1
    windows, classes = [], []
    for index, shape in enumerate(world.shapes):
        for radius in np.outer(world.radii, _TEMPLATE_SCALES).ravel():
            shift = _centroids(coverage_stamp(shape, radius, 0.5, 0.5, half + 2)[None])[0]
            for row in _TEMPLATE_OFFSETS:
                for column in _TEMPLATE_OFFSETS:
                    windows.append(coverage_stamp(shape, radius, column - shift[1], row - shift[0], half).ravel())
                    classes.append(index)
    return np.stack(windows), np.array(classes)


def _centroids(windows: np.ndarray) -> np.ndarray:
    """Centre of mass (row, column) of coverage windows [m, k, k], from the central pixel's centre; [m, 2]."""
    span = np.arange(windows.shape[-1]) - windows.shape[-1] // 2
    mass = np.maximum(windows.sum((1, 2)), 1e-9)
    return np.stack([windows.sum(2) @ span, windows.sum(1) @ span], -1) / mass[:, None]


@functools.cache
def min_area(world: World) -> int:
    """Fewest pixels of an object: a share of the world's smallest clean one."""
    half = stamp_half(world)
    smallest = min(coverage_stamp(shape, min(world.radii), 0.5, 0.5, half).sum() for shape in world.shapes)
    return int(MIN_AREA_SHARE * smallest)


def _boxes(slices) -> np.ndarray:
    """(row start, row stop, column start, column stop) of the last two axes of slices; int [m, 4]."""
    return np.array([[s[-2].start, s[-2].stop, s[-1].start, s[-1].stop] for s in slices], int).reshape(-1, 4)


def _windows(maps: np.ndarray, index: np.ndarray, rows: np.ndarray, columns: np.ndarray, half: int) -> np.ndarray:
    """Windows of maps[index] around pixels (rows, columns), zero outside; [m, 2 half + 1, 2 half + 1, ...]."""
    span = np.arange(-half, half + 1)
    r, c = rows[:, None] + span, columns[:, None] + span
    known = ((r >= 0) & (r < maps.shape[1]))[:, :, None] & ((c >= 0) & (c < maps.shape[2]))[:, None, :]
    r, c = r.clip(0, maps.shape[1] - 1), c.clip(0, maps.shape[2] - 1)
    found = maps[index[:, None, None], r[:, :, None], c[:, None, :]]
    return found * known.reshape(known.shape + (1,) * (found.ndim - 3))


def _soft_masks(
    world: World, images: np.ndarray, backgrounds: np.ndarray, owner: np.ndarray, found: _Components
) -> np.ndarray:
    """Coverage of each component, centred on its centroid's pixel.

    A pixel of the component or next to it has coverage <x - background, color - background> / |color - background|^2,
    the inverse of how a renderer blends, relative to the component's own core and clipped to [0, 1]: how faint an
    object may be is decided by its color, not by its shape. Pixels of other components have none.

    Args:
      images: sRGB [n, h, w, 3]; backgrounds: sRGB [n, 3]; owner: int [n, h, w], component of each pixel or 0.
    Returns:
      float32 [m, k, k] with the templates' k.
    """
    half = stamp_half(world) + 1
    reach = half + 2  # room to move the window onto the centroid
    rows, columns = found.boxes[:, :2].sum(1) // 2, found.boxes[:, 2:].sum(1) // 2
    owners = _windows(owner, found.image, rows, columns, reach)
    mine = owners == found.label[:, None, None]
    near = ndimage.maximum_filter(mine.view(np.uint8), size=(1, 3, 3)).view(bool) & (mine | (owners == 0))
    start = backgrounds[found.image]
    direction = color_array(world.colors)[found.color] - start
    direction /= np.maximum((direction**2).sum(-1, keepdims=True), 1e-6)
    pixels = _windows(images, found.image, rows, columns, reach) - start[:, None, None]
    coverage = np.clip(np.einsum("mijc,mc->mij", pixels, direction), 0, 1) * near
    coverage = np.minimum(coverage / _core_level(coverage, mine), 1)
    moves = np.rint(_centroids(coverage)).astype(int).clip(-2, 2) + reach
    return _windows(coverage, np.arange(len(rows)), moves[:, 0], moves[:, 1], half)


def _core_level(coverage: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Typical coverage inside components: mean over their pixels of at least average coverage; [m, 1, 1]."""

    def mean(where):
        return (coverage * where).sum((1, 2), keepdims=True) / np.maximum(where.sum((1, 2), keepdims=True), 1)

    return np.maximum(mean(mine & (coverage >= mean(mine))), 1e-3)


def _classify(world: World, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best class index, its IoU and its lead over the other classes, for coverages [m, k, k]; each [m].

    The IoU of coverages is a.t / (a.a + t.t - a.t), which for zeros and ones is intersection over union.
    """
    templates, classes = _templates(world)
    masks = masks.reshape(len(masks), -1)
    overlap = masks @ templates.T
    iou = overlap / ((masks * masks).sum(1)[:, None] + (templates * templates).sum(1) - overlap)
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    by_class = np.maximum.reduceat(iou, starts, axis=1)
    ranked = np.sort(by_class, axis=1)
    lead = ranked[:, -1] - ranked[:, -2] if len(world.shapes) > 1 else ranked[:, -1]
    return by_class.argmax(1), ranked[:, -1], lead


def _distance(lab: np.ndarray, center: np.ndarray) -> np.ndarray:
    offset = lab - center
    return np.sqrt(np.einsum("...c,...c->...", offset, offset))


def _palette_masks(world: World, lab: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each palette colour, bool [n, colors, h, w], and pixels unlike the background, bool [n, h, w]."""
    palette = oklab(color_array(world.colors))
    to_background = _distance(lab, background[:, None, None])
    # |x - p|^2 = |x|^2 - 2 x.p + |p|^2: one matrix product instead of a distance per colour
    squares = np.einsum("...c,...c->...", lab, lab)[..., None] - 2 * lab @ palette.T + (palette * palette).sum(1)
    nearest = squares.argmin(-1)
    least = np.take_along_axis(squares, nearest[..., None], -1)[..., 0]
    colored = least < np.minimum(COLOR_DISTANCE, to_background) ** 2
    masks = (nearest[:, None] == np.arange(len(palette))[:, None, None]) & colored[:, None]
    return masks, to_background > JUNK_DISTANCE


def detect(world: World, images: np.ndarray, batch: int = 256) -> Detections:
    """Read the objects, the background and the junk off images.

    Args:
      images: sRGB [n, size, size, 3]; floats in [0, 1] (clipped), or uint8.
      batch: images handled at once; bounds memory.
    Raises:
      UserError: the images have another shape or are not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[1:] != (world.size, world.size, 3):
        raise UserError(
            f"world {world.name!r} reads images [n, {world.size}, {world.size}, 3] but got {list(images.shape)}; "
            "resize them or choose the world they were drawn for"
        )
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / 255
    if not np.isfinite(images).all():
        raise UserError("images contain values that are not finite; check the weights they were sampled with")
    parts = [_detect_batch(world, images[i : i + batch]) for i in range(0, len(images), batch)]
    return Detections(
        objects=tuple(objects for part in parts for objects in part.objects),
        background=np.concatenate([part.background for part in parts]) if parts else np.zeros(0, int),
        junk_fraction=np.concatenate([part.junk_fraction for part in parts]) if parts else np.zeros(0),
    )


def _components(world: World, masks: np.ndarray) -> tuple[np.ndarray, _Components]:
    """Components of color masks bool [n, colors, h, w] of at least `min_area` pixels, and each pixel's, [n, h, w]."""
    n, count, height, width = masks.shape
    labels, _ = ndimage.label(masks.reshape(n * count, height, width), _PLANAR)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    kept = np.flatnonzero(areas >= min_area(world))
    slices = ndimage.find_objects(labels)
    slices = [slices[label - 1] for label in kept]
    image, color = np.divmod(np.array([s[0].start for s in slices], int), count)
    owner = np.where(areas >= min_area(world), np.arange(len(areas)), 0)[labels].reshape(masks.shape).max(1)
    return owner, _Components(kept, image, color, _boxes(slices), areas[kept])


def _detect_batch(world: World, images: np.ndarray) -> Detections:
    n, size = len(images), world.size
    images = np.clip(images, 0, 1).astype(np.float32, copy=False)
    lab = oklab(images)
    border: np.ndarray = np.ones((size, size), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(lab[:, border], axis=1)
    masks, unlike_background = _palette_masks(world, lab, background)
    owner, found = _components(world, masks)

    objects: list[list[Detection]] = [[] for _ in range(n)]
    accepted = np.zeros(owner.max(initial=0) + 1, bool)
    if len(found.label):
        flat = np.median(images[:, border], axis=1)
        best, iou, lead = _classify(world, _soft_masks(world, images, flat, owner, found))
        sides = np.maximum(found.boxes[:, 1] - found.boxes[:, 0], found.boxes[:, 3] - found.boxes[:, 2])
        good = (iou >= MIN_IOU) & (lead >= MIN_LEAD) & (sides <= 2 * stamp_half(world) + 3)
        accepted[found.label[good]] = True
        for k in np.flatnonzero(good):
            top, bottom, left, right = map(float, found.boxes[k])
            names = world.shapes[best[k]], world.colors[found.color[k]]
            row = Detection(*names, (left, top, right, bottom), int(found.area[k]), float(iou[k]), float(lead[k]))
            objects[found.image[k]].append(row)
    return Detections(
        objects=tuple(tuple(sorted(rows, key=lambda row: -row.iou)) for rows in objects),
        background=_background_class(world, background),
        junk_fraction=(unlike_background & ~_dilate(accepted[owner])).mean((1, 2)),
    )


def _dilate(masks: np.ndarray) -> np.ndarray:
    """Grow bool masks [n, h, w] by DILATION pixels in every direction."""
    span = 2 * DILATION + 1
    return ndimage.maximum_filter(masks.view(np.uint8), size=(1, span, span)).view(bool)


def _background_class(world: World, background: np.ndarray) -> np.ndarray:
    distances = _distance(background[:, None], oklab(color_array(world.backgrounds)))
    nearest = distances.argmin(1)
    return np.where(distances.min(1) < BACKGROUND_DISTANCE, nearest, -1)


# --- verdicts on one image -----------------------------------------------------------------------------------------


def lenient_verdict(found: Sequence[Detection], record: Mapping) -> bool:
    """GenEval's verdict for objects sorted by confidence.

    Every included class needs its `count` most confident objects to exist, to have the requested color, and each to
    stand in the requested relation to each of the reference's; an excluded class must stay below its `count`.
    """
    groups: list[list[Detection] | None] = []
    for item in record["include"]:
        group = [d for d in found if d.shape == item["class"]][: item["count"]]
        good = len(group) == item["count"] and all(d.color == item.get("color", d.color) for d in group)
        if good and "position" in item:
            relation, reference = item["position"]
            others = groups[reference]
            good = others is not None and all(
                relation in relations_between(a.box, b.box) for a in group for b in others
            )
        groups.append(group if good else None)
    excluded = any(sum(d.shape == item["class"] for d in found) >= item["count"] for item in record.get("exclude", ()))
    return not excluded and all(group is not None for group in groups)


def requested_objects(record: Mapping) -> int:
    """How many objects the record asks for."""
    return sum(item["count"] for item in record["include"])


def strict_verdict(found: Sequence[Detection], record: Mapping) -> bool:
    """The objects are exactly the requested ones: GenEval's verdict, and not one object more (no junk guard)."""
    return len(found) == requested_objects(record) and lenient_verdict(found, record)


def partial_verdict(found: Sequence[Detection], record: Mapping) -> float:
    """Mean over the record's clauses, each in [0, 1].

    Per included item: max(0, 1 - |found - count| / count); with a color, the share of `count` that is found in that
    color; with a position, the share of the pairs of objects that stand in the relation (0 without a pair).
    """
    terms = []
    groups = [[d for d in found if d.shape == item["class"]] for item in record["include"]]
    for item, group in zip(record["include"], groups):
        count = item["count"]
        terms.append(max(0.0, 1 - abs(len(group) - count) / count))
        if "color" in item:
            terms.append(min(1.0, sum(d.color == item["color"] for d in group) / count))
        if "position" in item:
            relation, reference = item["position"]
            pairs = [relation in relations_between(a.box, b.box) for a in group for b in groups[reference]]
            terms.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return float(np.mean(terms))


def judge_detections(detections: Detections, records: Sequence[Mapping]) -> Verdicts:
    """Verdicts for image i against records[i]. Raises UserError when the numbers differ."""
    if len(records) != len(detections.objects):
        raise UserError(f"{len(detections.objects)} images but {len(records)} records; give one record per image")
    pairs = list(zip(detections.objects, records))
    lenient = np.array([lenient_verdict(found, record) for found, record in pairs], bool)
    unguarded = lenient & np.array([len(found) == requested_objects(record) for found, record in pairs], bool)
    return Verdicts(
        lenient=lenient,
        strict=unguarded & (detections.junk_fraction < JUNK_LIMIT),
        strict_unguarded=unguarded,
        partial=np.array([partial_verdict(found, record) for found, record in pairs], np.float64),
        junk_fraction=detections.junk_fraction,
        background=detections.background,
        objects=np.array([len(found) for found in detections.objects], int),
        detections=detections,
    )


def judge(world: World, images: np.ndarray, records: Sequence[Mapping]) -> Verdicts:
    """Detect, then judge image i against records[i]; see `detect` for the images."""
    return judge_detections(detect(world, images), records)
