"""The pages of the documentation, and the code blocks in them."""

import re
from pathlib import Path
from typing import NamedTuple

import mpbroadcast

ROOT = Path(mpbroadcast.__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / name for name in ("RELIABILITY.md", "SECURITY.md")), *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block. ``output`` is the ``text`` block right behind a script, if there is one: what the script prints."""

    page: Path
    line: int
    language: str
    text: str
    output: str | None

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of one page, in order. A script whose info string is ``python continued`` continues the one before."""
    text = page.read_text()
    found: list[Block] = []
    matches = list(re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    for match, following in zip(matches, [*matches[1:], None], strict=False):
        language, code = match[1], match[2]
        if language == "python continued":
            language, code = "python", found[-1].text + code
        output = None
        if following is not None and following[1] == "text" and not text[match.end() : following.start()].strip():
            output = following[2]
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, language, code, output))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SCRIPTS = [block for block in BLOCKS if block.language == "python"]
