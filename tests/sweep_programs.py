"""Stands for train, evaluate and the counting of costs: their command lines and files, without networks."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def train(options: Mapping[str, str]) -> None:
    """Steps with a line of metrics each and folders for checkpoints; step 4 fails where it is told to."""
    folder = Path(options["workdir"])
    saved = folder / "checkpoints"
    saved.mkdir(parents=True, exist_ok=True)
    steps, every = int(options.get("config.steps", 6)), int(options.get("config.checkpoint.every", 2))
    done = max((int(path.name) for path in saved.iterdir() if (path / "state").is_dir()), default=0)
    print("begins at", done, flush=True)
    with open(folder / "metrics.jsonl", "a") as log:
        for step in range(done + 1, steps + 1):
            time.sleep(float(options.get("config.nap", 0)))
            if options.get("config.fail") == "True" and step == 4:
                print("error: step 4 does not want to")
                sys.exit(2)
            line = {"step": step, "dm/loss": float(step), "reward/x": None if step == 2 else 1.0}
            print(json.dumps(line), file=log, flush=True)
            if step % every == 0 or step == steps:
                (saved / str(step) / "state").mkdir(parents=True)


def measured(k: int) -> dict:
    """Eight images of four prompts by the k-th model."""
    keys = ("strict", "lenient", "judge/shapes_judge")
    images = [dict(zip(keys, ((i + k) % 3 == 0, True, 0.1 * k + 0.01 * i))) for i in range(8)]
    summary = {key: {"mean": sum(float(image[key]) for image in images) / 8, "se": 0.1, "n": 8} for key in keys}
    summary["background_entropy"] = {"mean": 1.0 / (k + 1), "se": 0.05, "n": 8}
    return {"summary": summary, "images": images}


def evaluate(options: Mapping[str, str], models: Sequence[str]) -> None:
    rows = []
    for k, model in enumerate(models):
        name, _, path = model.partition("=")
        assert "checkpoints" not in path or Path(path).is_dir(), path
        row = {"name": name, "nfe": 4, "grid": [1, 0], "kernel": "ode", "guidance": 1.0, "images_per_second": 9.0}
        row |= measured(k)
        difference = {"mean": -0.5, "se": 0.1, "n": 8}
        row["differences"] = {"teacher": dict.fromkeys(row["summary"], difference)} if k else {}
        rows.append(row)
    results = {
        "environment": {"versions": {"jax": "1"}, "commit": "c", "processor": "p", "devices": "d"},
        "settings": {"world": "small", "per_tag": 2, "per_prompt": 1, "seed": 1},
        "prompts": [{"prompt": f"p{i // 2}", "noise_seed": i} for i in range(8)],
        "models": rows,
    }
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results))


def cost(options: Mapping[str, str], stages: Sequence[str]) -> None:
    found = {"stages": list(stages), "training": 5e12, "fake_update": 1.0, "generator_update": 2.0}
    half = Path(options["out"]).with_suffix(f".{os.getpid()}.tmp")
    half.write_text(json.dumps(found))
    half.replace(options["out"])


def main(name: str, arguments: Sequence[str]) -> None:
    pairs = [a.removeprefix("--").split("=", 1) for a in arguments if a.startswith("--") and "=" in a]
    if name == "train":
        train(dict(pairs))
    elif name == "evaluate":
        evaluate(dict(pairs), [value for key, value in pairs if key == "model"])
    else:
        cost(dict(pairs), arguments[arguments.index("--stage") :])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
