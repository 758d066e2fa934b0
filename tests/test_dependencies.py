"""The lists of dependencies are what is imported, and say why each is there."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"dmdr_jax", "configs", "tests", "benchmarks"}
BY_HAND = {"dmdr_jax/evaluation/detect.py": {"torch"}}
"""Programs that say themselves what they need beyond requirements.txt."""
OF_OTHERS = {"httpx2": "huggingface-hub"}
"""What a test imports to play the part of a package that requires it."""


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(file):
    """Requirement and reason of each line of a requirements file."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {normal(re.match(r"[A-Za-z0-9._-]+", line)[0]): line.partition("  # ")[2] for line in lines}


def imported(*folders):
    """Modules imported in the folders' Python files: {top-level name: a file that imports it}."""
    found = {}
    for file in (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))):
        name = str(file.relative_to(ROOT))
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in {module.partition(".")[0] for module in modules} - BY_HAND.get(name, set()):
                found.setdefault(module, name)
    return {m: file for m, file in found.items() if m not in OURS and m not in sys.stdlib_module_names}


def distributions(modules):
    """The packages that these modules may come from."""
    known = packages_distributions()
    return {module: {normal(name) for name in known.get(module, [])} for module in modules}


def test_what_the_package_imports_is_listed():
    needed, required = imported("dmdr_jax", "configs"), listed("requirements.txt")
    missing = {m: needed[m] for m, names in distributions(needed).items() if not names & set(required)}
    assert missing == {}


def test_what_tests_and_benchmarks_import_is_listed():
    needed = imported("tests", "benchmarks")
    required = {**listed("requirements.txt"), **listed("requirements-test.txt")}
    missing = {m: needed[m] for m, names in distributions(needed).items() if not names & set(required)}
    assert {m: file for m, file in missing.items() if OF_OTHERS.get(m) not in required} == {}


@pytest.mark.parametrize(
    "file, folders", [("requirements.txt", ["dmdr_jax", "configs"]), ("requirements-test.txt", ["tests", "benchmarks"])]
)
def test_what_is_listed_is_imported_or_says_who_needs_it(file, folders):
    used = set().union(*distributions(imported(*folders)).values())
    for name, reason in listed(file).items():
        said = reason.startswith("not imported: ")
        assert said != (name in used), f"{name} in {file} is {'' if name in used else 'not '}imported"


def test_every_dependency_of_the_package_has_its_reason():
    assert [name for name, reason in listed("requirements.txt").items() if not reason] == []


def test_the_package_says_the_same_as_the_list():
    """setuptools reads the file: reasons behind the lines must not become part of a requirement."""
    from setuptools.config.pyprojecttoml import apply_configuration
    from setuptools.dist import Distribution

    dist = apply_configuration(Distribution({"src_root": str(ROOT)}), str(ROOT / "pyproject.toml"))
    names = {normal(re.match(r"[A-Za-z0-9._-]+", str(line))[0]) for line in dist.install_requires}
    assert names == set(listed("requirements.txt"))
