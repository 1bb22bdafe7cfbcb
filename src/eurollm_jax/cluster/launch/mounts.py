"""What a container must have mounted beside the site's own folders: an input elsewhere would not be there in a job."""

import os
from collections.abc import Iterable
from pathlib import Path
from string import Template

from eurollm_jax.cluster.launch.job import container_of
from eurollm_jax.cluster.site import Site
from eurollm_jax.errors import UserError

WILDCARDS = set("*?[")


def to_mount(site: Site, directory: Path, account: str | None, paths: Iterable[Path]) -> tuple[str, ...]:
    """Of folders, and of the folders of files and patterns: those that are not below the working `directory`, nor below
    what the site mounts. A link is mounted by both its names. Raises UserError for what --bind cannot say."""
    mounted = [directory, *_of_site(site, account)]
    found: list[Path] = []
    for path in paths:
        named = _without_wildcards(Path(os.path.abspath(path)))
        for one in (named, named.resolve()):
            folder = one if one.is_dir() or not one.exists() else one.parent
            if any(folder.is_relative_to(known) for known in (*mounted, *found)):
                continue
            if bad := [character for character in str(folder) if character in ",:" or character.isspace()]:
                raise UserError(
                    f"{folder} has a {bad[0]!r} in its name, at which containers divide what they mount: move or "
                    "rename it."
                )
            found.append(folder)
    return tuple(map(str, found))


def _of_site(site: Site, account: str | None) -> list[Path]:
    """Those that can be told before the job runs."""
    variables = {**os.environ, **({} if account is None else {"SLURM_JOB_ACCOUNT": account})}
    texts = [*container_of(site).binds, *([] if site.scratch is None else [site.scratch])]
    filled = [Template(text).safe_substitute(variables) for text in texts]
    return [Path(text) for text in filled if "$" not in text and ":" not in text]


def _without_wildcards(path: Path) -> Path:
    """The folder above the first part of a pattern that is not a plain name."""
    for number, part in enumerate(path.parts):
        if WILDCARDS & set(part) and not Path(*path.parts[: number + 1]).exists():
            return Path(*path.parts[:number])
    return path
