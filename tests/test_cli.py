"""The command line: parsing, configurations, one-line errors, exit status, and speed of --help."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from dmdr_jax import accelerators, cli, config_help
from dmdr_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = """
    from ml_collections import ConfigDict, config_dict

    def get_config(name="plain"):
        c = ConfigDict()
        c.steps = 10
        c.name = name
        c.flag = False
        c.levels = (1, 2)
        c.limit = config_dict.placeholder(int)
        c.nothing = None
        c.optim = ConfigDict(dict(generator=dict(lr=1e-4), fake=dict(lr=2e-4)))
        c.terms = [ConfigDict(dict(kind="dm", weight=1.0))]
        return c
"""

PROGRAM = '''
    """Adds nothing to nothing."""

    from absl import flags

    from dmdr_jax import cli
    from dmdr_jax.errors import UserError

    flags.DEFINE_string("workdir", None, "Where things go.", required=True)
    flags.DEFINE_integer("number", 1, "How many.")
    cli.define_config()

    def main(config):
        if config.name == "bad":
            raise UserError("first line\\nsecond line")
        if config.name == "bug":
            raise RuntimeError("a bug")
        if config.name == "interrupt":
            raise KeyboardInterrupt
        print(config.steps, flags.FLAGS.workdir, flags.FLAGS.number)

    if __name__ == "__main__":
        cli.run(main)
'''


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(textwrap.dedent(CONFIG))
    return str(path)


@pytest.fixture
def program(tmp_path, config_file):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))

    def call(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, path, *arguments], env=environment, capture_output=True, text=True)

    return call


# --- configurations ---


def test_overrides_take_the_types_of_their_keys(config_file):
    overrides = ["steps=3", "flag=true", "levels=(4, 5, 6)", "limit=7", "optim.generator.lr=1e-5", "terms[0].weight=2"]
    config = cli.load_config(config_file, overrides)
    assert config.steps == 3 and config.flag is True and config.levels == (4, 5, 6) and config.limit == 7
    assert config.optim.generator.lr == 1e-5 and config.optim.fake.lr == 2e-4 and config.terms[0].weight == 2.0
    assert config.is_locked
    assert cli.load_config(config_file).steps == 10


def test_argument_of_get_config_and_lookup_beside_the_package(config_file, tmp_path, monkeypatch):
    assert cli.load_config(f"{config_file}:fancy").name == "fancy"
    monkeypatch.chdir(tmp_path)
    shipped = next((ROOT / "configs").rglob("*.py")).relative_to(ROOT)
    assert list(cli.config_keys(cli.load_config(str(shipped))))


def test_config_keys_are_those_that_can_be_overridden(config_file):
    keys = dict(cli.config_keys(cli.load_config(config_file)))
    assert keys["optim.generator.lr"] == 1e-4 and keys["terms[0].weight"] == 1.0
    assert "optim" not in keys and "terms" not in keys


@pytest.mark.parametrize(
    "override, message",
    [
        ("stpes=3", "unknown config key 'stpes'; did you mean 'steps'?"),
        ("optim.generator.learning_rate=3", "unknown config key 'optim.generator.learning_rate'; did you mean"),
        ("lr=3", "unknown config key 'lr'; did you mean 'optim.fake.lr' or 'optim.generator.lr'?"),
        ("quux=3", "unknown config key 'quux'; the keys are "),
        ("steps.more=3", "unknown config key 'steps.more'"),
        ("terms[1].weight=3", "unknown config key 'terms[1].weight'; did you mean 'terms[0].weight'?"),
        ("steps=abc", "config key 'steps' cannot be 'abc': "),
        ("flag=perhaps", "config key 'flag' cannot be 'perhaps': "),
        ("optim=3", "config key 'optim' is a group; override one of optim.fake, optim.generator"),
        ("nothing=3", "config key 'nothing' is None without a type"),
    ],
)
def test_bad_overrides(config_file, override, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        cli.load_config(config_file, ["name=first", override])


def test_the_override_to_blame_is_named(config_file):
    with pytest.raises(UserError, match="config key 'steps'"):
        cli.load_config(config_file, ["steps=abc", "name=last"])


def test_files_that_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match=r"absent\.py does not exist"):
        cli.load_config(str(tmp_path / "absent.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return undefined\n")
    with pytest.raises(UserError, match=r"cannot load config .*broken\.py: NameError: name 'undefined' is not defined"):
        cli.load_config(str(broken))


# --- programs with a configuration ---


def test_a_program_runs(program, config_file):
    result = program(f"--config={config_file}", "--workdir", "here", "--config.steps", "3", "--config.flag")
    assert (result.returncode, result.stdout, result.stderr) == (0, "3 here 1\n", "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workdir=d"], "--config is required; see --help"),
        (["--config=CONFIG"], "--workdir is required; see --help"),
        (["--config=CONFIG", "--workdir=d", "--config.steps=x"], "config key 'steps' cannot be 'x'"),
        (["--config=CONFIG", "--workdir=d", "--wrkdir=d"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        (["--config=CONFIG", "--workdir=d", "--number=x"], "flag --number=x"),
        (["--config=CONFIG", "--workdir=d", "stray"], "unexpected argument 'stray'"),
        (["--config=CONFIG", "--workdir=d", "--config.name=bad"], "first line second line"),
    ],
)
def test_bad_input_is_one_line_and_status_2(program, config_file, arguments, message):
    result = program(*(argument.replace("CONFIG", config_file) for argument in arguments))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_a_bug_shows_its_traceback_and_an_interrupt_does_not(program, config_file):
    common = [f"--config={config_file}", "--workdir=d"]
    bug = program(*common, "--config.name=bug")
    assert bug.returncode == 1 and "Traceback" in bug.stderr
    interrupt = program(*common, "--config.name=interrupt")
    assert (interrupt.returncode, interrupt.stderr) == (130, "interrupted\n")


def test_help(program, config_file):
    for flag in ("--help", "-h"):
        result = program(flag)
        assert result.returncode == 0 and result.stderr == ""
        assert "Adds nothing to nothing." in result.stdout and "--workdir: Where things go. (required)" in result.stdout
    keys = program(f"--config={config_file}", "--config.help").stdout
    assert "--config.optim.generator.lr=0.0001" in keys and "--config.terms[0].kind='dm'" in keys
    assert program("--config.help").returncode == 2


# --- what keys mean ---

SHIPPED = [
    str(p.relative_to(ROOT))
    for p in sorted((ROOT / "configs").rglob("*.py"))
    if "def get_config(" in p.read_text() and p.stem != "common"
]
COMMENTED = """
    # Of the file.

    def get_config():
        c = ConfigDict()
        c.steps = 10  # updates
        # Two lines
        # above.
        c.text = ConfigDict(
            dict(width=3)
        )
        c.bare = 1
        c.inner = _inner(2)  # a group
        _more(c)
        return c

    def _inner(n):
        c = ConfigDict()
        c.rank = n  # of "#1"
        return c

    def _more(c):
        c.last = "#no comment"  # a comment
"""


def test_meanings_are_the_comments_beside_keys(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(textwrap.dedent(COMMENTED))
    found = {
        "steps": "updates",
        "text": "Two lines above.",
        "bare": "",
        "inner": "a group",
        "inner.rank": 'of "#1"',
        "last": "a comment",
    }
    assert config_help.meanings(file) == found
    assert config_help.meaning_of("text.width", found) == "Two lines above." and not config_help.meaning_of("no", found)


def test_every_key_of_a_run_has_its_own_meaning():
    known = config_help.meanings(config_help.BASE)
    keys = [key for key, _ in cli.config_keys(cli.load_config("configs/base.py"))]
    assert len(keys) > 100
    assert [key for key in keys if not known.get(key)] == []
    reward = cli.load_config("configs/shapes/sd3.py").rewards.shapes_clip
    assert [key for key in reward if not known.get(f"rewards.NAME.{key}")] == []


@pytest.mark.parametrize("spec", SHIPPED)
def test_every_key_of_every_configuration_is_explained(spec):
    known = config_help.all_meanings(ROOT / spec)
    keys = list(cli.config_keys(cli.load_config(spec)))
    assert [key for key, _ in keys if not config_help.meaning_of(key, known)] == []
    text = "\n".join(config_help.listing(ROOT / spec, keys))
    assert all(f"  --config.{key}={value!r}" in text for key, value in keys)


def test_what_a_configuration_begins_with_explains_its_keys(tmp_path):
    file = tmp_path / "mine.py"
    lines = ("from configs.shapes import pretrain_sd3 as first", "def get_config():", "    c = first.get_config()")
    file.write_text("\n".join([*lines, "    c.vae.steps = 5", "    c.teacher.lr = 1.0  # mine", "    return c"]))
    known = config_help.all_meanings(file)
    assert (known["vae.steps"], known["teacher.lr"], known["vae.batch"]) == ("updates", "mine", "pictures per update")


def test_the_programs_help_explains_every_key():
    command = [sys.executable, "-m", "dmdr_jax.train", "--config=configs/shapes/sd3.py", "--config.help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"--config\.batch=32 +prompts per update", text)
    assert re.search(r"--config\.rewards\.shapes_hps\.weight=0\.3 +in the loss", text)


# --- tools without one ---


def test_tools_use_argparse_with_the_same_ending(capsys):
    def tool():
        parser = cli.make_parser("Looks at a model.")
        parser.add_argument("--model", required=True)
        return parser

    def exit_status(main, argv):
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main, tool(), argv)
        return exit_info.value.code

    assert exit_status(lambda args: print(args.model), ["--model", "m"]) == 0
    assert capsys.readouterr().out == "m\n"
    assert exit_status(print, []) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --model; see --help\n"
    assert exit_status(print, ["--model=m", "--modle=x"]) == 2
    assert exit_status(lambda args: 3, ["--model=m"]) == 3
    assert exit_status(print, ["--help"]) == 0


# --- every program ---

PROGRAMS = [
    name
    for name in ("train", "sample", "export", "evaluate", "report", "plan", "sweep", "shapes.pretrain")
    if importlib.util.find_spec(f"dmdr_jax.{name}")
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_every_program_loads_no_jax(name):
    command = [sys.executable, "-X", "importtime", "-m", f"dmdr_jax.{name}", "--help"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip()
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "dmdr_jax" in imported and not imported & {"jax", "flax", "orbax", "transformers", "clu"}


@pytest.mark.skipif(not accelerators.has_libtpu() or accelerators.may_have_tpu(), reason="of libtpu without a TPU")
def test_libtpu_is_quiet_where_there_is_no_tpu(monkeypatch):
    of_jax = {k: v for k, v in os.environ.items() if k in accelerators.OF_JAX} | {"TPU_SKIP_MDS_QUERY": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")} | of_jax
    environment |= {"PYTHONPATH": str(ROOT)}
    program = "from dmdr_jax.accelerators import quiet_libtpu; quiet_libtpu(); import jax; print(jax.devices()[0])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and "TPU" not in done.stderr

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name in accelerators.NO_TPU:  # for `monkeypatch` to put back what there was
        monkeypatch.setenv(name, "of this machine")
    accelerators.quiet_libtpu()  # the environment knows of a TPU
    assert {os.environ[name] for name in accelerators.NO_TPU} == {"of this machine"}
