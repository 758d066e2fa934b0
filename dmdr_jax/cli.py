"""What every program shares: its arguments, its configuration, and how it ends.

A program with a configuration:

    flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go.", required=True)
    cli.define_config("configs/shapes/sd3.py")

    def main(config):
        from dmdr_jax.training import loop  # jax is imported here, after --help was answered
        loop.train(config, flags.FLAGS.workdir)

    if __name__ == "__main__":
        cli.run(main)

takes `--config=FILE.py` and overrides `--config.KEY=VALUE`; `config` is the locked ConfigDict. A tool without one gives
its argparse parser, `cli.run(main, parser)`, and `main` gets the parsed arguments.

Exit status: 0 done, 2 bad input (one line on stderr), 130 interrupted; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from dmdr_jax.accelerators import quiet_libtpu
from dmdr_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

BAD_INPUT = 2
INTERRUPTED = 130
HELP = ("-h", "--help", "--helpfull", "--config.help")


def run(
    main: Callable[[Any], int | None],
    parser: argparse.ArgumentParser | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse the command line, call `main` with what it says, and exit."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = parser.parse_args(argv) if parser else parse_flags(argv)
        _quiet_libraries()
        quiet_libtpu()
        status = main(given) or 0
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        status = BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    sys.exit(status)


# --- tools: argparse -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """An argparse parser that shows a program's docstring as its help and raises UserError."""
    style = argparse.RawDescriptionHelpFormatter
    return _Parser(prog=_program_name(), description=doc, formatter_class=style, allow_abbrev=False)


# --- programs with a configuration: absl flags ---------------------------------------------------------------------


def define_config(default: str | None = None) -> None:
    """Let the program take --config and --config.KEY=VALUE."""
    from absl import flags

    text = "Configuration, FILE.py or FILE.py:ARG. --config.KEY=VALUE overrides a key; --config.help explains them."
    flags.DEFINE_string("config", default, text, required=default is None, module_name=sys.argv[0])


def parse_flags(argv: Sequence[str]) -> ConfigDict | None:
    """Parse absl's flags; returns the configuration, overridden and locked, where the program has one.

    `--help` prints the program's docstring and flags, `--config.help` the configuration's keys and what they mean as
    well; both exit.

    Raises:
      UserError: a flag is unknown, missing or malformed, or a config key does not exist.
    """
    from absl import flags

    has_config = "config" in flags.FLAGS
    wants_help = any(argument in HELP for argument in argv)
    if wants_help:
        _print_help(argv)
        sys.exit(0)
    overrides, rest = _take_overrides(argv) if has_config else ([], argv)
    try:
        unused = flags.FLAGS(["program", *rest])[1:]
    except flags.Error as error:
        missing = re.search(r"Flag (--\S+) must have a value", str(error))
        why = f"{missing[1]} is required" if missing else _last_line(error)
        raise UserError(f"{why}; see --help") from None
    if unused:
        raise UserError(f"unexpected argument {unused[0]!r}; flags are written --name=value")
    return load_config(flags.FLAGS.config, overrides) if has_config else None


def overrides_of(argv: Sequence[str]) -> list[str]:
    """The overrides of a command line, "KEY=VALUE" each, as `load_config` takes them."""
    return _take_overrides(argv)[0]


def _take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off `--config.KEY=VALUE`, `--config.KEY VALUE` and the bare `--config.KEY` of a switch."""
    overrides, rest = [], []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override:
            bare = not arguments or arguments[0].startswith("--")
            override += "=true" if bare else f"={arguments.pop(0)}"
        overrides.append(override)
    return overrides, rest


def _print_help(argv: Sequence[str]) -> None:
    from absl import flags

    main = sys.modules["__main__"]
    print(f"{(main.__doc__ or '').strip()}\n\nusage: {_program_name()} [flags]")
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        default = "required" if flag.default is None else f"default {flag.default}"
        print(f"  --{flag.name}: {flag.help} ({default})")
    if "--config.help" in argv and "config" in flags.FLAGS:
        named = [argument.partition("=")[2] for argument in argv if argument.startswith("--config=")]
        spec = named[-1] if named else flags.FLAGS["config"].default
        if not spec:
            raise UserError("--config.help needs --config=FILE too")
        from dmdr_jax.config_help import listing

        print(f"\nkeys of {spec}, with their values there; None: the method says it (dmdr_jax/methods.py)\n")
        file = pathlib.Path(_find_config(spec).partition(":")[0])
        print("\n".join(listing(file, list(config_keys(load_config(spec))))))


# --- configurations ------------------------------------------------------------------------------------------------


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """A configuration file's `get_config()`, overridden and locked.

    Args:
      spec: FILE.py, or FILE.py:ARG to call get_config(ARG); where there is no such file, it is looked for beside the
        package too.
      overrides: "KEY=VALUE" each; the value is read as the type that KEY has.

    Raises:
      UserError: the file cannot be loaded, a key does not exist, or a value does not fit its key.
    """
    spec = _find_config(spec)
    config = _load(spec, ())
    _check_keys(config, overrides)
    return _load(spec, overrides) if overrides else config


def config_keys(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf, keys dotted."""
    from ml_collections import ConfigDict

    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from config_keys(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, ConfigDict) for item in value):
            for i, item in enumerate(value):
                yield from config_keys(item, f"{prefix}{name}[{i}].")
        else:
            yield f"{prefix}{name}", value


def _find_config(spec: str) -> str:
    file, colon, argument = spec.partition(":")
    beside = pathlib.Path(__file__).parents[1] / file
    if os.path.isfile(file):
        return spec
    if beside.is_file():
        return f"{beside}{colon}{argument}"
    raise UserError(f"config file {file} does not exist; check the path")


def _load(spec: str, overrides: Sequence[str]) -> ConfigDict:
    from absl import flags
    from ml_collections import config_flags

    argv = ["program", f"--config={spec}", *(f"--config.{override}" for override in overrides)]
    values = flags.FlagValues()  # not the global ones: a configuration is loaded without side effects
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        values(argv)
        return values.config.lock()
    except UserError:
        raise
    except Exception as error:  # whatever the file itself raises
        if len(overrides) > 1:
            for override in overrides:  # find the one to blame
                _load(spec, [override])
        if overrides:
            key, _, value = overrides[-1].partition("=")
            raise UserError(f"config key {key!r} cannot be {value!r}: {_last_line(error)}") from error
        raise UserError(f"cannot load config {spec}: {type(error).__name__}: {_last_line(error)}") from error


def _check_keys(config: ConfigDict, overrides: Sequence[str]) -> None:
    from ml_collections import ConfigDict
    from ml_collections.config_flags import config_path

    known = [key for key, _ in config_keys(config)]
    for key in (override.split("=", 1)[0] for override in overrides):
        try:
            value = config_path.get_value(key, config)
            kind = config_path.get_type(key, config)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"unknown config key {key!r}; {_nearest(key, known)}") from None
        if isinstance(value, ConfigDict):
            inside = ", ".join(f"{key}.{name}" for name in value)
            raise UserError(f"config key {key!r} is a group; override one of {inside}")
        if kind is type(None):
            raise UserError(f"config key {key!r} is None without a type; make it a config_dict.placeholder in the file")


def _nearest(key: str, known: Sequence[str]) -> str:
    """A hint: the key that is spelt most alike, or those that end alike; else the keys and groups there are."""
    same_end = [other for other in known if other.split(".")[-1] == key.split(".")[-1]]
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or same_end[:3]
    if alike:
        return f"did you mean {' or '.join(map(repr, alike))}?"
    first = dict.fromkeys(f"{group}.*" if dot else group for group, dot, _ in (other.partition(".") for other in known))
    return f"the keys are {', '.join(first)}"


# --- the rest ------------------------------------------------------------------------------------------------------


def _program_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {os.path.basename(sys.argv[0])}"


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _quiet_libraries() -> None:
    from absl import flags
    from absl import logging as absl_logging

    flags.FLAGS.mark_as_parsed()  # libraries read absl flags of their own, which argparse programs do not parse
    absl_logging.get_absl_logger().addFilter(_reported_elsewhere)
    sys.unraisablehook = _show_unraisable


def _reported_elsewhere(record: logging.LogRecord) -> bool:
    """Drop Orbax's log: what goes wrong is raised too, and is then reported once and in one line."""
    return "orbax" not in pathlib.Path(record.pathname).parts


def _show_unraisable(unraisable: Any) -> None:
    """sys.unraisablehook, without the pages that Orbax's other reads and writes print when one of them has failed."""
    code = getattr(unraisable.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in pathlib.Path(code.co_filename).parts
    of_tensorstore = str(unraisable.exc_value) == "Event loop is closed"
    if not (of_orbax or of_tensorstore):
        sys.__unraisablehook__(unraisable)
