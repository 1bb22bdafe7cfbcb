"""What a study hands on: its mixture as Python to paste into an experiment, and as a datamix.txt.

The Python keeps every digit of the shares, so the mixture that it makes equals the one that the study found, and both
files give a run the same rows. Where a study declines, its shares are only written with that at their head, and no
datamix.txt, which cannot carry a warning.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eurollm_jax.data.datamix import write_datamix
from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.recipe import Shares
from eurollm_jax.errors import UserError
from eurollm_jax.evaluation.report.frame import write_whole
from eurollm_jax.languages import LANGUAGES

WIDTH = 110  # of comments


def write_outputs(
    folder: Path,
    mixture: Mixture,
    sizes: Mapping[str, SourceSize],
    total_rows: int,
    *,
    study: str,
    fingerprint: str,
    declined: Sequence[str] = (),
    prefixes: Mapping[str, Path | str] | None = None,
) -> None:
    """Write `folder`/mixture.py and, unless the study declined, `folder`/datamix.txt.

    Args:
        mixture: shares of tokens by source, as `Space.mixture` makes it.
        sizes: of the store's sources.
        total_rows: of the run that the mixture is for; explicit shares do not depend on it.
        declined: why the study does not recommend the mixture; empty where it does.
        prefixes: path of each source's Megatron dataset; by default its name.
    """
    literal = mixture_literal(
        mixture, study, fingerprint, declined, {name: size.language for name, size in sizes.items()}
    )
    write_whole(folder / "mixture.py", literal)
    blend = folder / "datamix.txt"
    if declined:
        blend.unlink(missing_ok=True)
        return
    partial = folder / ".datamix.txt.partial"
    try:
        write_datamix(partial, mixture.compile(sizes, total_rows), sizes, prefixes or {name: name for name in sizes})
        partial.replace(blend)
    finally:
        partial.unlink(missing_ok=True)


def mixture_literal(
    mixture: Mixture, study: str, fingerprint: str, declined: Sequence[str], languages: Mapping[str, str]
) -> str:
    """A Python module that defines MIXTURE, the largest shares first. `languages`: code by source, for comments."""
    shares = token_shares(mixture)
    head = [f"Mixture of the study {study!r}, fingerprint {fingerprint[:16]}: shares of tokens by source."]
    if declined:
        head += [f"NOT RECOMMENDED: {' '.join(declined)}"]
    lines = [line for words in head for line in _comment(words)]
    lines += ["", "from eurollm_jax.data.mixture import Mixture", "", "MIXTURE = Mixture.shares(", "    {"]
    for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        code = languages.get(name, "")
        language = f"{LANGUAGES[code].name}, " if code in LANGUAGES else ""
        lines.append(f"        {_quoted(name)}: {share!r},  # {language}{100 * share:.3g} %")
    lines += ["    },", '    "tokens",', '    over="source",', ")"]
    return "\n".join(lines) + "\n"


def token_shares(mixture: Mixture) -> dict[str, float]:
    """The shares of a mixture that is explicit shares of tokens by source and nothing more, as a study makes it."""
    rule = mixture.stages[0].recipe.rule
    shares = dict(rule.kind.values) if isinstance(rule.kind, Shares) else {}
    if not shares or mixture != Mixture.shares(shares, "tokens", over="source"):
        raise UserError(f"{mixture!r} is more than shares of tokens by source: give one that a study made.")
    return shares


def _quoted(name: str) -> str:
    """As Python that formatters leave alone."""
    return repr(name) if '"' in name else '"' + repr(name)[1:-1].replace("\\'", "'") + '"'


def _comment(words: str) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + 1 + len(word) > WIDTH and lines[-1]:
            lines.append("")
        lines[-1] += f" {word}"
    return [f"#{line}" for line in lines]
