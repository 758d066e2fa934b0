"""The documentation against the code: commands, Python, links, names of files and of functions, messages.

What happens to a command (a line of a `bash` block):

* `python -m dmdr_jax.report` is run, in a folder with two runs.
* `bash launch/tpu/...` in launch/README.md is run with --dry-run by tests/launch/test_scripts.py; `gcloud compute tpus`
  is checked there against gcloud's flags.
* Of every other `python -m ...` the arguments are parsed by the program's own parser; a configuration is loaded with
  its overrides, and checked as training does it. The block says why it is not run, `<!-- not run: ... -->` before it.
* Anything else must say why it is not run.

Python blocks are run: pipelines are small random ones in the place of the trained student.
"""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dmdr_jax import cli
from tests import markdown
from tests.markdown import PAGES, ROOT, Block

BLOCKS = [block for page in PAGES for block in markdown.blocks(page)]
BASH = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
ABSL = ("dmdr_jax.train", "dmdr_jax.plan", "dmdr_jax.shapes.pretrain")
"""Programs with a configuration; the others have an argparse parser."""
README = ROOT / "README.md"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_run(block: Block, words: list[str]) -> bool:
    """Whether a test runs this command: here, or in tests/launch/test_scripts.py."""
    if words[:2] == ["python", "-m"]:
        return words[2] == "dmdr_jax.report" and not any("://" in word for word in words)
    in_launch = block.page == "launch/README.md"
    return in_launch and (words[1].startswith("launch/tpu/") if words[0] == "bash" else words[:3] == GCLOUD_TPUS)


GCLOUD_TPUS = ["gcloud", "compute", "tpus"]


# --- commands ---


def test_there_is_something_to_check():
    assert {"README.md", "docs/methods.md", "docs/training.md", "launch/README.md"} <= {name(page) for page in PAGES}
    assert len(BASH) > 15 and len(PYTHON) >= 3
    assert {block.language for block in BLOCKS} <= {"bash", "python", ""}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_stand_between_fences(page):
    assert re.findall(r"^    (?:python|pip|bash|git|gcloud) .*", markdown.prose(page), re.MULTILINE) == []


@pytest.mark.parametrize("block", BASH, ids=str)
def test_every_command_is_run_or_says_why_not(block):
    assert block.commands()
    for words in block.commands():
        assert block.why_not or is_run(block, words), f"{block}: {' '.join(words)}"
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words[1]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_arguments_are_what_the_programs_take(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == README:
        (tmp_path / "mine.py").write_text(own_reward().text)
    with_flags: dict[str, list[list[str]]] = {}
    for module, *arguments in markdown.program_calls(page):
        assert importlib.util.find_spec(module), module
        arguments = [word for word in arguments if word != "..."]
        if module in ABSL:
            with_flags.setdefault(module, []).append(with_defaults(arguments))
        else:
            program = importlib.import_module(module)
            (getattr(program, "parser", None) or program.make_parser)().parse_args(arguments)
    for module, calls in with_flags.items():
        parse_flags(module, calls)
        for arguments in calls if module == "dmdr_jax.train" else []:
            check_config(arguments)


def with_defaults(arguments: list[str]) -> list[str]:
    """With a configuration and a workdir where the text leaves them out by `...`."""
    for flag, value in (("--config", "configs/shapes/sd3.py"), ("--workdir", "runs/mine")):
        if not any(word == flag or word.startswith(f"{flag}=") for word in arguments):
            arguments = [f"{flag}={value}", *arguments]
    return arguments


def parse_flags(module: str, calls: list[list[str]]) -> None:
    """Parses in another process: each of these programs defines its own --config."""
    if module != "dmdr_jax.train":
        calls = [[word for word in call if not word.startswith("--workdir=")] for call in calls]
    program = f"""
        import json, sys, {module}
        from absl.testing import flagsaver
        from dmdr_jax import cli
        for call in json.load(sys.stdin):
            with flagsaver.flagsaver():
                cli.parse_flags(call)
    """
    command = [sys.executable, "-c", re.sub(r"^ {8}", "", program, flags=re.MULTILINE)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, input=json.dumps(calls), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def check_config(arguments: list[str]) -> None:
    """As the first thing that training does."""
    from dmdr_jax.training import setup

    (spec,) = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    setup.check(cli.load_config(spec, cli.overrides_of(arguments)))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with the runs and the evaluation that the commands name."""
    config = {"model": "m", "steps": 9, "batch": 2, "seed": 0, "rewards": {}, "student": {"steps": 4}}
    for run in ("mine", "other", "a", "b"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        document = {"config": {**config, "seed": len(run), "generator": {"kind": "lora"}}}
        (tmp_path / "runs" / run / "config.json").write_text(json.dumps(document))
        (tmp_path / "runs" / run / "metrics.jsonl").write_text('{"step": 1, "dm/score_gap": 0.2}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reports_of_the_text_are_made(runs):
    from dmdr_jax import report

    calls = [w[3:] for b in BASH if not b.why_not for w in b.commands() if w[:3] == ["python", "-m", "dmdr_jax.report"]]
    assert len(calls) > 1
    for arguments in calls:
        report.main(report.parser().parse_args(arguments))
        page = runs / "report.html"
        assert page.read_text().startswith("<!doctype html>")
        page.unlink()


# --- Python ---


def own_reward() -> Block:
    (found,) = [block for block in PYTHON if block.page == "README.md" and "def get_config" in block.text]
    return found


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """By the pipeline's class, a folder in which `student` is a small random pipeline of it."""
    from diffusers import LCMScheduler

    from tests import tiny_pipelines

    folders = {}
    for kind in ("sd3", "sdxl"):
        folder = tmp_path_factory.mktemp(kind)
        pipe = tiny_pipelines.build(kind)
        if kind == "sdxl":  # what export sets for a student
            pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(folder / "student")
        folders[type(pipe).__name__] = folder
    return folders


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block, students, tmp_path, monkeypatch):
    if block.why_not:
        return
    pipelines = [folder for kind, folder in students.items() if kind in block.text]
    monkeypatch.chdir(pipelines[0] if pipelines else tmp_path)
    scope: dict = {"__name__": "block"}
    # fp16 is for accelerators: a CPU would take minutes, or lack an operation.
    exec(block.text.replace("torch.float16", "torch.float32"), scope)
    if pipelines:
        assert len(block.text.split("\n\n")[-1].splitlines()) + 2 <= 5  # imports, pipe, image
        assert np.asarray(scope["image"]).ndim == 3


def test_the_own_reward_is_one(tmp_path, monkeypatch):
    from dmdr_jax.rewards.registry import open_spec
    from dmdr_jax.training import setup

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(own_reward().text)
    config = cli.load_config("mine.py")
    (spec,) = [spec for spec in setup.reward_specs(config) if spec.name == "colourful"]
    grey, colour = np.full((8, 8, 3), 0.5, np.float32), np.tile(np.float32([1, 0, 0]), (8, 8, 1))
    scores = open_spec(spec).score_prompts(np.stack([grey, colour]), ["a", "b"], 2)
    assert scores[0] == 0 and scores[1] > 0.4


# --- links, files, names ---


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(page):
    for link in markdown.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert ROOT in (target, *target.parents)
        if anchor:
            assert anchor in markdown.anchors(target), f"{name(page)}: {link}"


MADE = {"launch/variables.sh", "benchmarks/results/"}
"""Files that users and programs make."""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    bases = (ROOT, page.parent, ROOT / "dmdr_jax", ROOT / "launch", ROOT / "configs")
    for text in markdown.code_names(page):
        found = re.fullmatch(r"(?:dmdr_jax|configs|docs|launch|tests|benchmarks)/[\w./-]*", text)
        if found and text not in MADE and not any(part.isupper() for part in text.split("/")):
            assert any((base / text).exists() for base in bases), f"{name(page)}: {text}"


@pytest.mark.parametrize("page", [ROOT / "docs" / f"{p}.md" for p in ("architecture", "methods")], ids=name)
def test_functions_that_are_named_exist(page):
    """`training/step.generator_step`, `objectives/dm`, `process.Flow` and the like."""
    for text in markdown.code_names(page):
        found = re.fullmatch(r"((?:[a-z_]+/)+[a-z_0-9]+)(?:\.([A-Za-z_]+)(?:\.(\w+))?)?", text)
        folder = found and ROOT / "dmdr_jax" / found[1].split("/")[0]
        if not found or not folder.is_dir():
            continue
        if (ROOT / "dmdr_jax" / found[1]).is_dir():
            continue
        file = ROOT / "dmdr_jax" / f"{found[1]}.py"
        assert file.is_file(), f"{name(page)}: {text}"
        if found[2] and found[2] != "py":
            defined = names_in(file)
            assert found[2] in defined, f"{name(page)}: {text}"
            assert not found[3] or found[3] in defined[found[2]], f"{name(page)}: {text}"


def names_in(file: Path) -> dict[str, set[str]]:
    """What a module defines, and of classes what they do."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = node.body if isinstance(node, ast.ClassDef) else []
            members = {n.name for n in inner if isinstance(n, ast.FunctionDef)}
            members |= {n.target.id for n in inner if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            found[node.name] = members
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: set() for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_architecture_lists_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Layout")[2].split("```")[1]
    folder, listed = "", set()
    for line in text.splitlines():
        if line.startswith("configs/"):
            break
        if heading := re.match(r"^  (?:(\w+)/|\S)", line):
            folder = heading[1] or ""
        for pattern in re.findall(r"[\w*]+\.py", line):
            listed |= {str(f.relative_to(ROOT)) for f in (ROOT / "dmdr_jax" / folder).glob(pattern)}
            assert any((ROOT / "dmdr_jax" / folder).glob(pattern)), f"{pattern} in {line}"
    modules = {name(file) for file in (ROOT / "dmdr_jax").rglob("*.py") if file.name != "__init__.py"}
    assert modules - listed == set()


def test_methods_are_counted_and_configurations_named():
    from dmdr_jax import methods

    numbers = {16: "sixteen", 17: "seventeen", 18: "eighteen"}
    assert f"All {numbers[len(methods.METHODS)]}" in README.read_text()
    for method in methods.METHODS:
        assert f"`{method}`" in (ROOT / "docs" / "methods.md").read_text()
    for config in (ROOT / "configs").glob("s*.py"):
        assert f"`{name(config)}`" in README.read_text()


# --- messages ---


def strings_of_the_package() -> str:
    """Every string of the code, a formatted one with a zero byte where something is put in, a line each."""
    found = []
    for folder in ("dmdr_jax", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_messages_are_those_of_the_code():
    page = ROOT / "docs" / "troubleshooting.md"
    rows = re.findall(r"^\| `([^`]+)`( \(JAX's own\))?", page.read_text(), re.MULTILINE)
    assert len(rows) > 30
    strings = strings_of_the_package()
    for message, of_others in rows:
        parts = [part.strip("'\"; ") for part in message.split("...")]
        known = [part for part in parts if len(part) > 8]
        assert known
        assert of_others or [part for part in known if part not in strings] == [], message


def test_every_program_is_in_the_table():
    text = README.read_text().partition("## Programs")[2]
    programs = [f.stem for f in (ROOT / "dmdr_jax").glob("*.py") if re.search(r"^if __name__ ==", f.read_text(), re.M)]
    assert len(programs) > 5
    assert [program for program in programs if f"`python -m dmdr_jax.{program}`" not in text] == []
