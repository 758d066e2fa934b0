"""Writes the generated parts of docs/results.md and its figures, from the committed records alone.

    python -m dmdr_jax.experiments.results            # writes
    python -m dmdr_jax.experiments.results --check    # says whether the page is what the records say

A part stands between `<!-- results of FILE.py -->` and `<!-- end of FILE.py -->`, FILE.py (or FILE.py:ARG) being an
experiment; everything else in the page is left as it is. An experiment without records has an empty part. A figure that
none of them has any longer is removed from the figures' folder.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from dmdr_jax import cli
from dmdr_jax.errors import UserError
from dmdr_jax.experiments import figures
from dmdr_jax.experiments.spec import Experiment, load
from dmdr_jax.experiments.tables import Line, cost_table, lines_of, main_table, monitor_table, pair_table, task_table

PAGE, RECORDS = Path("docs/results.md"), Path("benchmarks/results")
FIGURES = Path("images/results")  # beside the page
_PART = re.compile(r"(<!-- results of (?P<spec>\S+) -->\n)(?P<body>.*?)(<!-- end of (?P=spec) -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- results of (\S+) -->")


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("--page", type=Path, default=PAGE, help=f"the page (default: {PAGE})")
    p.add_argument("--records", type=Path, default=RECORDS, help=f"folder of the records (default: {RECORDS})")
    p.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something would change")
    return p


def main(args: argparse.Namespace) -> int:
    files = render(args.page, args.records)
    left = sorted(set((args.page.parent / FIGURES).glob("*.svg")) - set(files))
    stale = [file for file, text in files.items() if not (file.is_file() and file.read_text(encoding="utf-8") == text)]
    if args.check:
        for file in stale:
            print(f"{file} is not what the records say: run python -m dmdr_jax.experiments.results")
        for file in left:
            print(f"{file} is a figure of no experiment on the page: run python -m dmdr_jax.experiments.results")
        return 1 if stale or left else 0
    for file in stale:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(files[file], encoding="utf-8")
        print(file)
    for file in left:
        file.unlink()
        print(f"{file} removed: no experiment on the page has this figure")
    return 0


def render(page: Path, records: Path) -> dict[Path, str]:
    """The page and its figures as they should be, by file.

    Raises:
      UserError: the page is not there, one of its parts has no end, or records do not fit together.
    """
    if not page.is_file():
        raise UserError(f"{page} does not exist; give --page.")
    text = page.read_text(encoding="utf-8")
    parts = list(_PART.finditer(text))
    ended = [part["spec"] for part in parts]
    for spec in _OPENING.findall(text):
        if spec not in ended:
            raise UserError(f"{page}: <!-- results of {spec} --> has no <!-- end of {spec} -->.")
    files: dict[Path, str] = {}
    written, position = [], 0
    for part in parts:
        experiment = load(part["spec"])
        body, drawn = section(experiment, lines_of(experiment, records))
        files |= {page.parent / FIGURES / name: svg for name, svg in drawn.items()}
        written += [text[position : part.start("body")], body]
        position = part.end("body")
    return {page: "".join([*written, text[position:]]), **files}


def section(experiment: Experiment, lines: Sequence[Line]) -> tuple[str, dict[str, str]]:
    """One experiment's part of the page, and its figures by file name; both empty without records."""
    if not lines:
        return "", {}
    drawn = {
        f"{experiment.name}_{figures.stem(figure, i)}.svg": (figures.describe(figure), svg)
        for i, figure in enumerate(experiment.figures)
        if (svg := figures.draw(figure, experiment, lines))
    }
    pictures = [f"![{text}]({(FIGURES / name).as_posix()})\n" for name, (text, _) in drawn.items()]
    pairs, falls, costs = pair_table(experiment, lines), monitor_table(lines), cost_table(lines)
    blocks = [
        main_table(experiment, lines),
        caption(experiment, lines) + "\n",
        task_table(lines) if experiment.tasks else "",
        pairs and pairs + f"\n{PAIR_CAPTION}\n",
        *pictures,
        falls and falls + f"\n{MONITOR_CAPTION}\n",
        costs and costs + f"\n{COST_CAPTION}\n",
        origin(experiment, lines),
    ]
    return "\n" + "\n".join(block for block in blocks if block) + "\n", {name: svg for name, (_, svg) in drawn.items()}


PAIR_CAPTION = (
    "Mean differences on the same seed, prompt and noise, with 95 % confidence intervals; **bold** where the interval "
    "leaves out 0."
)
MONITOR_CAPTION = (
    "For each seed the step at which the run's own watch raised its alarm, and the first checkpoint from which on a "
    "measure stays worse than its best by more than two standard errors."
)
COST_CAPTION = (
    "Training counts everything that led to the model, a cold start shared with other rows included. Operations are "
    "counted from shapes (matrix products and convolutions), CPU minutes were measured, compiling included unless a "
    "compiled program was found in the cache; seconds per update are without start and compiling."
)


def caption(experiment: Experiment, lines: Sequence[Line]) -> str:
    """What the table's numbers are."""
    judged = lines[0].first("evaluation")
    images = len(lines[0].first("images", "units"))
    return (
        f"{images} images per model and seed: {judged['per_tag']} prompts for each of six tasks, compositions that "
        f"never occur in training where a task has them (world `{judged['world']}`, evaluation seed {judged['seed']}, "
        "the same prompts and noise for all). ± is one standard error over training seeds, prompts and noise together."
    )


def origin(experiment: Experiment, lines: Sequence[Line]) -> str:
    """How to run it again, and where these numbers come from."""
    records = [record for line in lines if not line.row.of for record in line.records]
    if not records:
        return ""
    environments = [record["environment"] for record in records]
    machines = sorted({f"{e.get('processor')} ({e.get('devices')})" for e in environments})
    versions = sorted({f"jax {e.get('versions', {}).get('jax')}" for e in environments})
    commits = sorted({str(e.get("commit")) for e in environments})
    costs = [record["cost"] for record in records]
    spent = sum(cost.get(f"{what}_cpu_seconds", 0.0) for cost in costs for what in ("training", "evaluation"))
    command = f"python -m dmdr_jax.sweep --experiment={experiment.spec} --out=runs/{experiment.name}"
    return (
        f"`{command}` makes these rows, `--rows=ROW --seeds=N` one of them; {len(records)} runs and evaluations took "
        f"{spent / 60:.0f} CPU minutes on {'; '.join(machines)}, {', '.join(versions)}, commit {', '.join(commits)}. "
        f"Settings and commands of every row stand in its record, `benchmarks/results/{experiment.name}/`.\n"
    )


if __name__ == "__main__":
    cli.run(main, parser())
