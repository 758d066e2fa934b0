"""Writes one self-contained page: pictures, curves, the table, and what the numbers say.

    python -m dmdr_jax.report runs/mine --evaluation runs/mine/evaluation --out report.html
    python -m dmdr_jax.report runs/a runs/b runs/c --evaluation evaluation      # any number of runs side by side
    python -m dmdr_jax.report gs://bucket/runs/first                            # from where a pod writes it
    python -m dmdr_jax.report --evaluation evaluation                           # an evaluation alone

Works while a run trains, and without an evaluation (then without table and verdict). Of several runs it prints in what
their settings and versions differ, too.
"""

import argparse
from typing import Any

from dmdr_jax import cli


def parser() -> argparse.ArgumentParser:
    p = cli.make_parser(__doc__)
    p.add_argument("runs", nargs="*", metavar="run", help="workdirs of runs, here or gs://")
    p.add_argument("--evaluation", help="folder that python -m dmdr_jax.evaluate wrote")
    p.add_argument("--out", default="report.html", help="the page (default: report.html)")
    return p


def main(args: Any) -> None:
    from pathlib import Path

    from dmdr_jax.errors import UserError
    from dmdr_jax.evaluation.comparison import differences_text
    from dmdr_jax.evaluation.report import write_report

    out = Path(args.out)
    try:
        runs = write_report(args.runs, Path(args.evaluation) if args.evaluation else None, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from None
    if len(runs) > 1:
        print(differences_text(runs))
    print(out)


if __name__ == "__main__":
    cli.run(main, parser())
