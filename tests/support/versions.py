"""Virtual environments with builds of this package whose protocols differ, for programs that meet."""

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Final

import pytest

from tests.support.pages import ROOT
from tests.support.victims import Program

# What is changed in each build: (file, what stands there once, what stands there instead).
Changes = list[tuple[str, str, str]]
VERSION: Final = "protocol/version.py"
NEWER: Final[Changes] = [
    (VERSION, "PROTOCOL: Final = 1\n", "PROTOCOL: Final = 2\n"),
    (VERSION, 'VERSION: Final = "0.1.0"', 'VERSION: Final = "9.8.7"'),
    ("bridge/entries.py", '_FORMAT: Final = b"1"', '_FORMAT: Final = b"2"'),
]
# As all versions were before there was a number: they announce none, and ask for none.
SILENT: Final[Changes] = [
    (VERSION, 'VERSION: Final = "0.1.0"', 'VERSION: Final = "0.0.9"'),
    ("protocol/control.py", " + announcement", ""),
    ("client/control_connection.py", "if proved.peer is None or proved.peer.protocol != OWN.protocol:", "if False:"),
    ("broker/control_connection.py", "if client is None:", "if False:"),
    ("broker/control_connection.py", "elif client.protocol != OWN.protocol:", "elif False:"),
]
BUILDS: Final[dict[str, Changes]] = {"this": [], "newer": NEWER, "silent": SILENT}
ANNOUNCES: Final = {
    "this": "protocol 1 (mpbroadcast 0.1.0)",
    "newer": "protocol 2 (mpbroadcast 9.8.7)",
    "silent": "announces no protocol",
}


@dataclasses.dataclass
class Environment:
    """A virtual environment with one build."""

    name: str
    folder: Path

    def program(self, *arguments: str, stdin: IO[str] | None = None) -> Program:
        """Start its Python with these arguments."""
        return Program(*arguments, stdin=stdin, executable=str(self.folder / "bin/python"))

    def ended(self, *arguments: str) -> tuple[int, str, str]:
        """Return the exit code, standard output and standard error of a program that ends by itself."""
        with self.program(*arguments) as program:
            return program.end()


def environments(folder: Path) -> dict[str, Environment]:
    """Build a wheel for each of ``BUILDS``, and install each into a virtual environment."""
    flags = ["--no-build-isolation"] if _has_setuptools() else []
    made = {}
    for name, changes in BUILDS.items():
        tree, wheels, home = folder / name / "tree", folder / name / "wheels", folder / name / "venv"
        shutil.copytree(ROOT / "mpbroadcast", tree / "mpbroadcast", ignore=shutil.ignore_patterns("__pycache__"))
        for other in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
            shutil.copy(ROOT / other, tree)
        for path, before, after in changes:
            text = (tree / "mpbroadcast" / path).read_text()
            assert text.count(before) == 1, f"{path}: {before}"
            (tree / "mpbroadcast" / path).write_text(text.replace(before, after))
        pip("wheel", "--no-deps", *flags, "--wheel-dir", str(wheels), str(tree))
        venv.create(home, symlinks=True)
        (site,) = home.glob("lib/python*/site-packages")
        pip("install", "--no-deps", "--no-index", "--target", str(site), *map(str, wheels.glob("*.whl")))
        (site / "shared.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))  # psutil
        made[name] = Environment(name, home)
    return made


def _has_setuptools() -> bool:
    """Return whether the one that is installed can build this package, so that pip need not install another one."""
    try:
        return int(metadata.version("setuptools").partition(".")[0]) >= 77
    except metadata.PackageNotFoundError:
        return False


@contextlib.contextmanager
def without_checkout() -> Iterator[None]:
    """Meanwhile programs find neither this checkout nor the working directory on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        patch.setenv("PYTHONSAFEPATH", "1")
        yield


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout + done.stderr
