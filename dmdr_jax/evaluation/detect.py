"""Looks for objects in GenEval's folders, with transformers' Mask2Former, and names their colours with CLIP.

    python -m dmdr_jax.evaluation.detect --images evaluation/geneval/student-1a2b3c4d5e \\
        --detector facebook/mask2former-swin-small-coco-instance --clip /data/clip-vit-large-patch14 --out seen.jsonl
    python -m dmdr_jax.evaluate --detections seen.jsonl --prompts evaluation_metadata.jsonl --out geneval.json

Needs PyTorch (``pip install torch``), for the detector alone. It is the kind of network that GenEval's program uses, in
transformers' implementation and with its preprocessing instead of mmdet's: its scores are not GenEval's, so name the
detector with them. Colours are found as GenEval finds them: everything but the object is painted grey, the picture is
cut to its box, and OpenAI's CLIP ViT-L/14 chooses among ten colours with three sentences each. A killed run goes on
where it was.
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmdr_jax import cli
from dmdr_jax.errors import UserError

GREY = 0x99  # what stands around an object when its colour is asked for
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
KEPT = 0.3  # detections below this confidence count in no task
BATCH = 8  # objects whose colours are asked for at a time

Found = dict[str, Any]
"""A detection as the file has it: label, score, box, and the mask, which the file does not have."""


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--images", required=True, help="folder with 00000/samples/00000.png, ...")
    p.add_argument("--detector", required=True, help="Mask2Former for instances of COCO: a folder or hub id")
    p.add_argument("--clip", help="folder of OpenAI's CLIP ViT-L/14; without it no colours")
    p.add_argument("--out", required=True, help="detections, JSON lines")
    return p


def main(args: Any) -> None:
    from tqdm import tqdm

    from dmdr_jax.evaluation.images import read_image

    root, out = Path(args.images), Path(args.out)
    files = sorted(root.glob("*/samples/*.png"))
    if not files:
        raise UserError(f"{root} holds no 00000/samples/*.png: give a folder laid out by --benchmark geneval.")
    done = names_in(out)
    detect = open_detector(args.detector)
    name_colors = open_colors(args.clip) if args.clip else None
    with open(out, "a", encoding="utf-8") as stream:
        for file in tqdm([f for f in files if str(f.relative_to(root)) not in done], unit="image"):
            image = read_image(file)
            found, record = detect(image), read_record(file)
            if name_colors:
                colored = [f for f in found if f["label"] in colored_classes(record)]
                for one, color in zip(colored, name_colors(image, colored)):
                    one["color"] = color
            listed = [{k: v for k, v in one.items() if k != "mask"} for one in found]
            line = {"filename": str(file.relative_to(root)), "detections": listed, "metadata": record}
            stream.write(json.dumps(line) + "\n")
            stream.flush()


def names_in(out: Path) -> set[str]:
    """Images that a file has detections of; a last line that was cut off is taken away."""
    if not out.is_file():
        return set()
    whole = out.read_text(encoding="utf-8").split("\n")
    kept = whole[:-1]
    if whole[-1]:
        out.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return {json.loads(line)["filename"] for line in kept if line}


def read_record(file: Path) -> dict[str, Any]:
    """GenEval's record of the prompt that an image is of; UserError where it is missing."""
    metadata = file.parents[1] / "metadata.jsonl"
    try:
        return json.loads(metadata.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{metadata} is missing or damaged ({error}): lay the images out once more.") from None


def colored_classes(record: Mapping[str, Any]) -> set[str]:
    """Classes whose colour a prompt asks for."""
    return {item["class"] for item in record["include"] if "color" in item}


# --- the detector ----------------------------------------------------------------------------------------------------


def open_detector(name: str) -> Callable[[np.ndarray], list[Found]]:
    """A function from a uint8 picture to what is seen in it, by GenEval's names of COCO's classes.

    Raises:
      UserError: PyTorch is not installed, or there is no such network.
    """
    try:
        import torch
    except ImportError:
        raise UserError("the detector needs PyTorch: pip install torch.") from None
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    try:
        processor = AutoImageProcessor.from_pretrained(name)
        network = Mask2FormerForUniversalSegmentation.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--detector {name} is no Mask2Former that can be read ({error}).") from None

    def detect(image: np.ndarray) -> list[Found]:
        with torch.no_grad():
            outputs = network(**processor(images=image, return_tensors="pt"))
        (seen,) = processor.post_process_instance_segmentation(
            outputs, threshold=KEPT, target_sizes=[image.shape[:2]], return_binary_maps=True
        )
        return listed(seen["segmentation"], seen["segments_info"], network.config.id2label)

    return detect


def listed(masks: Any, segments: Sequence[Mapping[str, Any]], labels: Mapping[int, str]) -> list[Found]:
    """Segments of transformers, with the boxes of their masks ``[n, h, w]``."""
    from dmdr_jax.evaluation.geneval import NAMES

    found = []
    for mask, segment in zip(masks if segments else [], segments):
        mask = np.asarray(mask) > 0
        name = labels[segment["label_id"]]
        one = {"label": NAMES.get(name, name), "score": float(segment["score"]), "box": box_of(mask)}
        found.append(one | {"mask": mask})
    return found


def box_of(mask: np.ndarray) -> list[float]:
    """Left, top, right, bottom of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


# --- colours ---------------------------------------------------------------------------------------------------------


def open_colors(path: str) -> Callable[[np.ndarray, Sequence[Found]], list[str]]:
    """A function from a picture and objects in it to their colours, by CLIP.

    Raises:
      UserError: there is no CLIP.
    """
    import jax

    from dmdr_jax.evaluation.geneval import COLORS
    from dmdr_jax.rewards.base import RewardSpec
    from dmdr_jax.rewards.clip_reward import embed_pixels, load_clip_reward
    from dmdr_jax.rewards.scoring import fill_up

    clip = load_clip_reward(RewardSpec("clip", path, kind="clipscore"))

    embed = jax.jit(functools.partial(embed_pixels, clip.vision))

    @functools.cache
    def classifier(name: str) -> np.ndarray:
        """Unit text features ``[colours, d]`` of a class in each colour, the mean of the sentences."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        means = clip.prompt_features(texts).reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def name_colors(image: np.ndarray, objects: Sequence[Found]) -> list[str]:
        colors: list[str] = []
        for start in range(0, len(objects), BATCH):
            some = objects[start : start + BATCH]
            pixels = fill_up(clip.preprocess.published([cut_out(image, one) for one in some]), BATCH)
            features = np.asarray(embed(clip.params, pixels))[: len(some)]
            colors += [COLORS[int((classifier(one["label"]) @ f).argmax())] for one, f in zip(some, features)]
        return colors

    return name_colors


def cut_out(image: np.ndarray, one: Found) -> np.ndarray:
    """The object alone, on grey, cut to its box."""
    left, top, right, bottom = (round(side) for side in one["box"])
    alone = np.where(one["mask"][..., None], image, np.uint8(GREY))
    return alone[top:bottom, left:right]


if __name__ == "__main__":
    cli.run(main, parser())
