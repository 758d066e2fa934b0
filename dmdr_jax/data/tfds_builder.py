"""Makes a TFDS data set of prompts alone, stored as ArrayRecord: written and read without tensorflow.

    python -m dmdr_jax.data.tfds_builder --prompts t2i-2m-filtered-prompts.txt --name t2i2m --out /data/tfds

Then train with --config.prompts=tfds:/data/tfds/dmdr_prompts/t2i2m/1.0.0 (the program prints it). Any source that
training takes can be built from (docs/evaluation.md lists them); --distinct leaves repeated prompts out.
"""

import argparse
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from dmdr_jax import cli
from dmdr_jax.errors import UserError

VERSION = "1.0.0"
ID_LENGTH = 16
CHECKED = 1000  # records that are compared with what a folder holds already


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--prompts", required=True, help="where the prompts come from: a file, a folder, tfds:NAME")
    p.add_argument("--out", required=True, help="TFDS' data folder, in which the data set gets its own")
    p.add_argument("--name", default="default", help="of the data set's configuration (default: default)")
    p.add_argument("--distinct", action="store_true", help="leave duplicates out, spacing aside")
    return p


@functools.cache  # TFDS knows a class by its name, and one of a name
def builder_class() -> Any:
    """The builder, whose ``prompts`` and ``source`` are set before it prepares."""
    import tensorflow_datasets as tfds

    class DmdrPrompts(tfds.core.GeneratorBasedBuilder):
        """Prompts of a text-to-image model."""

        VERSION = tfds.core.Version(VERSION)
        code_path = None  # TFDS would look for checksums of downloads beside it
        prompts: Sequence[str] = ()
        source = ""

        def _info(self) -> Any:
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict({"id": text, "prompt": text, "source": text})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            for i, prompt in enumerate(self.prompts):
                yield i, {"id": prompt_id(prompt), "prompt": prompt, "source": self.source}

    return DmdrPrompts


def build(prompts: Sequence[str], name: str, out: str, source: str) -> str:
    """Writes the data set, in the prompts' order; returns its folder.

    A record has ``prompt``, ``id`` (of the text: equal texts have equal ids in any data set) and ``source``. A folder
    that is there already stays as it is.

    Raises:
      UserError: the folder holds another list of prompts, or cannot be written.
    """
    import tensorflow_datasets as tfds

    config = tfds.core.BuilderConfig(name=name, description=f"{len(prompts)} prompts of {source}.")
    try:
        builder = builder_class()(data_dir=out, config=config, file_format="array_record")
        builder.prompts, builder.source = prompts, source
        builder.download_and_prepare()
    except OSError as error:
        raise UserError(f"cannot write the data set to {out} ({error.strerror or error}).") from error
    stored = builder.as_data_source("train")
    chosen = range(0, len(prompts), max(1, len(prompts) // CHECKED))
    if len(stored) != len(prompts) or any(stored[i]["prompt"].decode() != prompts[i] for i in chosen):
        raise UserError(f"{builder.data_dir} already holds other prompts: give another --name or --out.")
    return str(builder.data_dir)


def prompt_id(prompt: str) -> str:
    """What a prompt is known by everywhere: of its text, spacing and Unicode's composition aside."""
    from dmdr_jax.data.survey import normalised

    return hashlib.sha256(normalised(prompt).encode()).hexdigest()[:ID_LENGTH]


def main(args: Any) -> None:
    from pathlib import Path

    from dmdr_jax.data.prompts import all_prompts
    from dmdr_jax.data.survey import normalised, survey

    texts = all_prompts(args.prompts)
    print(survey(texts))
    prompts = [text for text in texts if text]
    if args.distinct:
        prompts = list({normalised(prompt): prompt for prompt in reversed(prompts)}.values())[::-1]
    if not prompts:
        raise UserError(f"{args.prompts} holds no prompts; give at least one")
    folder = build(prompts, args.name, args.out, Path(args.prompts).name)
    print(f"{len(prompts)} prompts in tfds:{folder}")


if __name__ == "__main__":
    cli.run(main, parser())
