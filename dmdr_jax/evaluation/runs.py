"""A training run as its workdir tells it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from dmdr_jax import workdir
from dmdr_jax.errors import UserError
from dmdr_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
      document: its config.json.
      rows: the lines of its metrics.
    """

    folder: epath.Path
    document: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Run":
        """Of a workdir, here or at a URL such as gs://bucket/runs/first, at any time while it trains.

        Raises:
          UserError: there is no run.
        """
        folder = epath.Path(folder)
        file = folder / workdir.CONFIG
        try:
            document = json.loads(file.read_text())
        except (OSError, ValueError):
            raise UserError(f"{file} is missing or damaged: give the workdir of python -m dmdr_jax.train.") from None
        return cls(folder, document, read_metrics(folder) if (folder / workdir.METRICS).exists() else [])

    @property
    def config(self) -> dict[str, Any]:
        return self.document["config"]

    @property
    def step(self) -> int:
        """Generator steps done."""
        return max((row["step"] for row in self.rows), default=0)


def active_rewards(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rewards that have a weight."""
    return {name: reward for name, reward in config["rewards"].items() if reward["weight"]}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
