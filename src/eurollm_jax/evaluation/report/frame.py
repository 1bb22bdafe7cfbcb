"""What reports share: the page around their sections, the names of languages, and what to say about a missing file."""

import os
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template

from eurollm_jax.evaluation.report.records import LanguageResult, Run
from eurollm_jax.evaluation.report.text import escape
from eurollm_jax.languages import LANGUAGES

STATUS_TITLES = {
    "official": "Official languages of the European Union",
    "candidate": "State languages of candidate countries",
    "associated": "State languages of the European Economic Area",
    "co-official": "Co-official in part of a member state",
    "regional": "Regional and minority languages",
    "partner": "State languages of the Eastern Partnership",
}


def section(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{anchor}"><h2>{title}</h2>{"".join(parts)}</section>'


def command(run: Path) -> str:
    """The command that makes all files of the run directory, and resumes where it stopped."""
    return f"eurollm train experiments/{run.resolve().name}.py"


def missing(run: Run, what: str, file: str) -> str:
    made_by = f"<code>{file}</code> is made by <code>{escape(command(run.path))}</code>."
    return f'<p class="missing">{what} {made_by}</p>'


def table_head(columns: list[tuple[str, str, str]]) -> str:
    """The head of a table. A column is its title (HTML), its classes, and the order of the first sort: up, down, ""."""
    cells = (
        f'<th scope="col" class="{css}"{f' data-sort="{order}"' if order else ""}>{title}</th>'
        for title, css, order in columns
    )
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def language_name(code: str) -> str:
    return LANGUAGES[code].name if code in LANGUAGES else code


def by_status(languages: Mapping[str, LanguageResult]) -> list[tuple[str, list[tuple[str, LanguageResult]]]]:
    """Languages in groups of one status, in the order of the language table; within a group by name."""
    known = [language.status for language in LANGUAGES.values()]
    order = dict.fromkeys([*known, *sorted(result.status for result in languages.values())])
    groups = [(status, [item for item in languages.items() if item[1].status == status]) for status in order]
    return [(status, sorted(group, key=lambda item: item[1].name)) for status, group in groups if group]


def page(title: str, body: str, style: str = "") -> str:
    """The whole page: `body` (HTML) in the frame of page.html, with further rules of CSS."""
    template = resources.files("eurollm_jax.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=escape(title), body=body, style=style)


def write_whole(path: Path, text: str) -> Path:
    """Write beside `path` and rename, so that a reader sees the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
