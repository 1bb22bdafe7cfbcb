"""The plan is the count of what the run reads, and its tables say so within 100 columns."""

from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.order import Order
from eurollm_jax.data.plan import mixture_plan, plan, share_steps
from eurollm_jax.data.plan_tables import mix_tables
from eurollm_jax.languages import LANGUAGES


def size(rows, language, octets=4):
    return SourceSize(rows * 512, rows * 512 * octets, rows, language)


SIZES = {
    "bg": size(700, "bg", 6),
    "cs": size(900, "cs"),
    "fi/hplt": size(60, "fi"),
    "fi/web": size(200, "fi", 5),
    "mt": size(30, "mt"),
}
STAGED = (
    Mixture.temperature(0.5, over="family", within=Mixture.temperature(0.3, over="language"))
    .floor({"mt": 0.02})
    .stage(at_row=800, mixture=Mixture.unimax(1.5).without("mt"), ramp_rows=300)
    .stage(at_row=1600, mixture=Mixture.proportional().only("Slavic"))
    .cap_epochs(2, excess="redistribute")
)
TOTAL = 2000


def read(mixture=STAGED, total=TOTAL):
    """Brute force: (source, epoch) of every row of the run."""
    schedule = mixture.compile(SIZES, total)
    source, epoch, _ = Order(schedule, {n: s.rows for n, s in SIZES.items()}, 0).rows(np.arange(total))
    return np.array(schedule.names)[source], epoch


def test_each_stage_and_the_total_count_what_is_read():
    made = mixture_plan(STAGED, SIZES, TOTAL)
    source, epoch = read()
    assert [(s.start, s.stop, s.ramp is not None) for s in made.stages] == [
        (0, 800, False), (800, 1100, True), (1100, 1600, False), (1600, 2000, False),
    ]  # fmt: skip
    for start, stop, sources in [(0, TOTAL, made.total), *((s.start, s.stop, s.sources) for s in made.stages)]:
        here, again = source[start:stop], epoch[start:stop] > 0
        assert {p.name for p in sources} >= set(here)
        for planned in sources:
            mine, of_source = SIZES[planned.name], here == planned.name
            rows = int(of_source.sum())
            assert (planned.rows, planned.share, planned.epochs) == (rows, rows / (stop - start), rows / mine.rows)
            assert planned.tokens == rows * 512
            assert planned.bytes == rows * 512 * mine.bytes // mine.tokens
            repeats = np.flatnonzero(of_source & again)
            assert planned.first_repeat == (start + repeats[0] if len(repeats) else None)
    assert plan(STAGED.compile(SIZES, TOTAL), SIZES, TOTAL) == tuple(
        type(p)(p.name, p.share, p.rows, p.tokens, p.bytes, p.epochs, p.first_repeat) for p in made.total
    )


def test_the_plan_says_what_binds_in_which_stage():
    made = mixture_plan(STAGED, SIZES, TOTAL)
    binds = [{p.name: set(p.binds) for p in stage.sources} for stage in made.stages]
    assert [stage.get("mt", set()) for stage in binds] == [{"cap"}, {"cap"}, set(), set()]
    assert [{n for n, b in stage.items() if "UniMax" in b} for stage in binds] == [
        set(), {"fi/hplt"}, {"fi/hplt"}, set(),
    ]  # fmt: skip
    epochs = {p.name: p.epochs for p in made.total}
    assert {p.name for p in made.total if "cap" in p.binds} == {"mt", "fi/hplt"}
    assert epochs["mt"] == pytest.approx(2, abs=0.1)
    floored = mixture_plan(Mixture.proportional().floor({"mt": 0.1}), SIZES, TOTAL)
    assert {p.name: p.binds for p in floored.total if p.binds} == {"mt": ("floor",)}
    assert not any(p.binds for p in mixture_plan(Mixture.proportional(), SIZES, TOTAL).total)


def test_a_ramp_goes_from_the_shares_before_it_to_those_after_it():
    mixture = Mixture.shares({"bg": 0.75, "cs": 0.25}).stage(
        at_row=100, mixture=Mixture.shares({"bg": 0.25, "fi/web": 0.75}), ramp_rows=50
    )
    ramp = mixture_plan(mixture, SIZES, 200).stages[1].ramp
    assert ramp == {"bg": (0.75, 0.25), "cs": (0.25, 0), "fi/web": (0, 0.75)}


def test_the_steps_of_the_shares_add_up_to_the_rows_read():
    schedule = STAGED.compile(SIZES, TOTAL)
    steps = share_steps(schedule)
    ends = [step["start"] for step in steps[1:]] + [TOTAL]
    rows = dict.fromkeys(SIZES, 0.0)
    for step, end in zip(steps, ends, strict=True):
        assert sum(step["shares"].values()) == pytest.approx(1)
        for name, share in step["shares"].items():
            rows[name] += share * (end - step["start"])
    source, _ = read()
    for name, expected in rows.items():
        assert (source == name).sum() == pytest.approx(expected, abs=len(steps))


def lines_of(tables, width=100):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().splitlines()


def test_tables_show_each_stage_with_sums_of_families_and_languages():
    made = mixture_plan(STAGED, SIZES, TOTAL)
    text = lines_of(mix_tables(made))
    titles = [line.strip() for line in text if "rows" in line and ":" in line]
    assert titles == [
        "The whole run: 2,000 rows",
        "Stage from row 0 to 800: 800 rows",
        "Ramp from row 800 to 1,100: 300 rows",
        "Stage from row 1,100 to 1,600: 500 rows",
        "Stage from row 1,600 to 2,000: 400 rows",
    ]
    rows = {p.name: p.rows for p in made.total}
    whole = text[: text.index(next(line for line in text if line.startswith("Stage from row 0")))]
    cells = {line.split()[0]: line.split() for line in whole if line.strip()}
    assert cells["Uralic"][3] == cells["fi"][3] == f"{rows['fi/hplt'] + rows['fi/web']:,}"
    assert cells["Slavic"][3] == f"{rows['bg'] + rows['cs']:,}"
    assert cells["fi/web"][3] == f"{rows['fi/web']:,}"
    assert sum(line.strip().startswith("bg ") for line in whole) == 1  # a language of one source has no sum of its own
    inner = [i for i, line in enumerate(text) if line.startswith(("Ramp", "Stage"))]
    assert ["→" in "".join(text[a:b]) for a, b in pairwise([*inner, len(text)])] == [False, True, False, False]
    by_source = lines_of(mix_tables(made, levels=()))
    assert not any("Slavic" in line for line in by_source)


def test_forty_languages_fit_100_columns_even_at_cluster_size():
    generator = np.random.default_rng(0)
    sizes = {
        f"{code}/hplt-v3-cleaned": SourceSize(rows * 8192, rows * 40_000, rows, code)
        for code, rows in zip(
            list(LANGUAGES)[:40], (10 ** generator.uniform(3, 10, 40)).astype(int).tolist(), strict=True
        )
    }
    mixture = (
        Mixture.temperature(0.3, over="family", within=Mixture.proportional(over="language"))
        .stage(at_row=10**9, mixture=Mixture.unimax(9, over="language"), ramp_rows=10**9)
        .floor(1e-5, over="language")
        .cap_epochs(50_000, excess="redistribute")
    )
    tables = mix_tables(mixture_plan(mixture, sizes, 3 * 10**9))
    narrow, wide = lines_of(tables), lines_of(tables, width=300)
    assert max(map(len, narrow)) <= 100
    assert [line.rstrip() for line in narrow] == [line.rstrip() for line in wide]  # nothing is cut off
    assert sum("/hplt" in line for line in narrow) >= 3 * 40
