"""Reading the project's Markdown: blocks of code with what is said before them, commands, links, headings."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "launch", "dmdr_jax/shapes/assets")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code between fences.

    Attributes:
      language: "bash", "python" or "" for what is no code.
      why_not: from the comment `<!-- not run: why -->` on the line before; "" where there is none.
    """

    page: str
    line: int
    language: str
    text: str
    why_not: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of each line of shell, comments left out, lines that end in a backslash joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, those indented as a whole by four spaces and a command left out."""
    before, language, start, held = "", None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, held = line[3:].strip(), number, []
            else:
                found = NOT_RUN.fullmatch(before.strip())
                name = str(page.relative_to(ROOT))
                yield Block(name, start, language, "\n".join(held), found[1] if found else "")
                language, before = None, ""
        elif language is not None:
            held.append(line)
        elif line.strip():
            before = line


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def program_calls(page: Path) -> list[list[str]]:
    """The words behind `python -m dmdr_jax.` or `python -m benchmarks.` of a page's commands, indented ones too."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ *python -m ((?:dmdr_jax|benchmarks)\..*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def links(page: Path) -> list[str]:
    """Where links and pictures of a page lead, those to other sites left out."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|href)="([^"]+)"', prose(page))
    return [target for target in targets if not re.match(r"[a-z]+://|mailto:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def code_names(page: Path) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", prose(page))
