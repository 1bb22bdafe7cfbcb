import json
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.data.plan import plan
from eurollm_jax.data.schedule import DEVIATION, SHARE_SUM
from eurollm_jax.errors import UserError

# 512 tokens a row and 4 bytes a token, but Greek with 6.
SIZES = {
    "bg": SourceSize(512_000, 2_048_000, 1000),
    "el": SourceSize(512_000, 3_072_000, 1000),
    "fi": SourceSize(2_048_000, 8_192_000, 4000),
    "is": SourceSize(25_600, 102_400, 50),
}


def row_shares(mixture, sizes=SIZES, total_rows=1000, stage=0):
    schedule = mixture.compile(sizes, total_rows)
    return {n: s / SHARE_SUM for n, s in zip(schedule.names, schedule.stages[stage].shares, strict=True) if s}


def close(expected):
    return pytest.approx(expected, abs=1e-9)


def test_proportional_reads_all_sources_equally_often():
    assert row_shares(Mixture.proportional()) == close({n: s.rows / 6050 for n, s in SIZES.items()})
    assert row_shares(Mixture.proportional("bytes")) == close(row_shares(Mixture.proportional()))


def test_temperature_raises_sizes_to_alpha():
    weights = {name: size.tokens**0.3 for name, size in SIZES.items()}
    total = sum(weights.values())
    assert row_shares(Mixture.temperature(0.3)) == close({name: w / total for name, w in weights.items()})
    assert row_shares(Mixture.temperature(0)) == close(dict.fromkeys(SIZES, 0.25))


def test_shares_hold_in_the_unit_they_are_stated_in():
    tokens = Mixture.shares({"bg": 0.4, "el": 0.6})
    octets = Mixture.shares({"bg": 0.4, "el": 0.6}, unit="bytes")
    assert row_shares(tokens) == close({"bg": 0.4, "el": 0.6})
    compiled = row_shares(octets)
    read = {name: compiled[name] * SIZES[name].bytes / SIZES[name].rows for name in compiled}
    assert read["el"] / (read["bg"] + read["el"]) == close(0.6)
    assert compiled["el"] == close(0.5)  # a Greek row holds one and a half times the bytes


def test_unimax_is_equal_up_to_the_cap():
    # 50 rows of Icelandic twice; the other 4,900 rows in three equal parts but for the caps at 2,000.
    assert row_shares(Mixture.unimax(2), total_rows=5000) == close(
        {"is": 100 / 5000} | dict.fromkeys(("bg", "el", "fi"), 4900 / 15000)
    )
    assert row_shares(Mixture.unimax(2), total_rows=8100) == close(
        {"is": 100 / 8100, "bg": 2000 / 8100, "el": 2000 / 8100, "fi": 4000 / 8100}
    )
    assert row_shares(Mixture.unimax(2), total_rows=100) == close(dict.fromkeys(SIZES, 0.25))
    with pytest.raises(UserError, match=r"unimax\(2\) can fill 12,100 rows .* asked for 12,101"):
        Mixture.unimax(2).compile(SIZES, 12_101)


sizes_strategy = st.dictionaries(
    st.sampled_from([f"s{i}" for i in range(12)]),
    st.builds(
        lambda rows, per: SourceSize(rows * 512, rows * per, rows), st.integers(1, 10**7), st.integers(500, 4000)
    ),
    min_size=1,
)


@settings(deadline=None)
@given(sizes_strategy, st.floats(0.1, 8), st.floats(1e-3, 1), st.sampled_from(["tokens", "bytes"]))
def test_unimax_is_the_water_filling_optimum(sizes, max_epochs, filled, unit):
    """Every source is either at the cap or at one common level, and no source is above either."""
    total_rows = math.floor(max_epochs * filled * sum(size.rows for size in sizes.values()))
    assume(total_rows >= 1)
    shares = row_shares(Mixture.unimax(max_epochs, unit), sizes, total_rows)
    epochs = {name: shares.get(name, 0) * total_rows / sizes[name].rows for name in sizes}
    amounts = {name: epochs[name] * getattr(sizes[name], unit) for name in sizes}
    level = max(amounts.values())
    for name in sizes:
        rounding = 2 * total_rows / SHARE_SUM / sizes[name].rows
        assert epochs[name] <= max_epochs * (1 + 1e-9) + rounding
        assert epochs[name] >= max_epochs * (1 - 1e-9) - rounding or amounts[name] == pytest.approx(level, rel=1e-4)


def test_only_and_without_rescale_and_scale_multiplies():
    shares = Mixture.shares({"bg": 0.5, "el": 0.3, "fi": 0.2})
    assert row_shares(shares.without("fi")) == close({"bg": 0.625, "el": 0.375})
    assert row_shares(shares.only("bg", "el")) == close({"bg": 0.625, "el": 0.375})
    assert row_shares(shares.scale(fi=4)) == close({"bg": 0.5 / 1.6, "el": 0.3 / 1.6, "fi": 0.8 / 1.6})
    assert shares.scale(fi=2).scale({"fi": 2}) == shares.scale(fi=4)
    # A rule is applied to the sources that are left: no source is pushed over UniMax's cap.
    assert row_shares(Mixture.unimax(1).without("fi"), total_rows=2050) == close(
        {"bg": 1000 / 2050, "el": 1000 / 2050, "is": 50 / 2050}
    )
    assert row_shares(shares) == close({"bg": 0.5, "el": 0.3, "fi": 0.2})  # the value itself has not changed


def test_stages_follow_each_other_and_operations_apply_to_all():
    mixture = Mixture.proportional().stage(at_row=300, mixture=Mixture.shares({"bg": 0.5, "fi": 0.5})).without("fi")
    schedule = mixture.compile(SIZES, 1000)
    assert [stage.start for stage in schedule.stages] == [0, 300]
    assert row_shares(mixture, stage=1) == {"bg": 1}
    assert "fi" not in row_shares(mixture)
    counts = dict(zip(schedule.names, schedule.counts(1000).tolist(), strict=True))
    assert counts["bg"] == 700 + round(300 * 1000 / 2050)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefghij"), st.floats(1e-6, 1), min_size=1))
def test_integer_shares_are_the_largest_remainder_rounding(weights):
    total = math.fsum(weights.values())
    shares = {name: w / total for name, w in weights.items()}
    sizes = {name: SourceSize(512, 2048, 1) for name in weights}
    schedule = Mixture.shares(shares).compile(sizes, 100)
    integers = dict(zip(schedule.names, schedule.stages[0].shares, strict=True))
    assert sum(integers.values()) == SHARE_SUM
    for name, share in shares.items():
        assert abs(integers[name] - share * SHARE_SUM) < 1 + 1e-3


def test_plan_counts_what_the_run_reads():
    schedule = Mixture.shares({"bg": 0.9, "is": 0.1}).compile(SIZES, 2000)
    bg, icelandic = plan(schedule, SIZES, 2000)
    assert (bg.name, bg.rows, bg.tokens, bg.bytes, bg.epochs) == ("bg", 1800, 1800 * 512, 1800 * 2048, 1.8)
    assert (icelandic.rows, icelandic.epochs, icelandic.share) == (200, 4, 0.1)
    assert abs(icelandic.first_repeat - 500) <= DEVIATION * 10
    assert schedule.counts(icelandic.first_repeat)[schedule.names.index("is")] == 50
    assert plan(schedule, SIZES, 400)[1].first_repeat is None


def test_a_cap_refuses_by_name():
    mixture = Mixture.shares({"bg": 0.9, "is": 0.1})
    assert mixture.cap_epochs(4).compile(SIZES, 2000) == mixture.compile(SIZES, 2000)
    with pytest.raises(UserError, match=r"cap_epochs\(3\) is exceeded in 2,000 rows by is \(4\)"):
        mixture.cap_epochs(3).compile(SIZES, 2000)


@pytest.mark.parametrize("total_rows", [12_100, 12_099, 5000])
def test_unimax_meets_its_own_cap(total_rows):
    Mixture.unimax(2).cap_epochs(2).compile(SIZES, total_rows)


BASE = Mixture.proportional()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture.shares({"bg": 0.5, "fi": 0.4}), r"the 2 shares sum to 0\.9, not 1"),
        (lambda: Mixture.shares({}), "the 0 shares sum to 0"),
        (lambda: Mixture.shares({"bg": 1.5, "fi": -0.5}), "'fi' has the share -0.5"),
        (lambda: Mixture.shares({"bg": math.nan}), "'bg' has the share nan"),
        (lambda: Mixture.temperature(-1), "alpha must be 0 or more, not -1"),
        (lambda: Mixture.temperature(math.inf), "alpha must be 0 or more, not inf"),
        (lambda: Mixture.unimax(0), "max_epochs must be above 0, not 0"),
        (lambda: Mixture.proportional("documents"), "unit is 'tokens', 'bytes' or 'content', not 'documents'"),
        (lambda: BASE.scale(fi=0), "'fi' has the factor 0"),
        (lambda: BASE.cap_epochs(math.nan), "cap_epochs: give a number above 0, not nan"),
        (lambda: BASE.cap_epochs(2, excess="drop"), "excess is 'refuse' or 'redistribute', not 'drop'"),
        (lambda: BASE.only(), "name at least one source"),
        (lambda: BASE.floor({"fi": 0}), "floor: 'fi' has 0; give a share above 0"),
        (lambda: BASE.floor(1.5), "floor: 'every source' has 1.5"),
        (lambda: BASE.floor(0.1, over="script"), "floor: over is 'source', 'language' or 'family', not 'script'"),
        (lambda: Mixture.proportional(over=None), "a mixture is over 'source', 'language' or 'family', not None"),
        (lambda: Mixture.proportional(over="language", within=BASE.without("fi")), "more than a rule; apply .scale"),
        (lambda: Mixture.proportional(within=BASE), "over 'source' cannot stand inside one over 'source'"),
        (
            lambda: Mixture.proportional(over="language", within=Mixture.proportional(over="family")),
            "over 'family' cannot stand inside one over 'language'",
        ),
        (lambda: BASE.content_premiums({"fi": 0}), "content_premiums: 'fi' has 0"),
        (lambda: BASE.content_premiums({"fl": 1}), "unknown language 'fl'"),
        (lambda: BASE.stage(at_row=5, mixture=BASE, ramp_rows=-1), "ramp_rows must be 0 or more, not -1"),
        (
            lambda: BASE.stage(at_row=5, mixture=BASE, ramp_rows=9).stage(at_row=13, mixture=BASE),
            "at_row=13 lies in the ramp of the last stage, which ends at row 14",
        ),
        (
            lambda: BASE.stage(at_row=5, mixture=BASE, ramp_rows=9).compile(SIZES, 13),
            "from row 5: the run ends at row 13, before the ramp of 9 rows does",
        ),
        (
            lambda: BASE.stage(at_row=9, mixture=BASE).stage(at_row=9, mixture=BASE),
            "at_row=9 does not come after row 9",
        ),
        (lambda: BASE.stage(at_row=9, mixture=BASE.cap_epochs(1)), "has stages, a cap or premiums of its own"),
        (
            lambda: Mixture.shares({"bg": 0.5, "fl": 0.5}).compile(SIZES, 9),
            "'fl', which the store lacks; did you mean 'fi'",
        ),
        (lambda: BASE.without("xyz").compile(SIZES, 9), "'xyz', which the store lacks; it has bg, el, fi, is"),
        (lambda: BASE.only("bg").without("bg").compile(SIZES, 9), "no source is left"),
        (lambda: BASE.without("fi").scale(fi=2).compile(SIZES, 9), "scale names 'fi', which has no share to scale"),
        (lambda: Mixture.shares({"bg": 1}).only("bg", "fi").compile(SIZES, 9), "'fi'.* has no share in any stage"),
        (lambda: BASE.compile({**SIZES, "mt": SourceSize(0, 0, 0)}, 9), r"mt is empty .* add \.without\('mt'\)"),
        (
            lambda: Mixture.shares({"bg": 1, "fi": 1e-12}).compile(SIZES, 9),
            "fi is given less than 1 row in 1,073,741,824",
        ),
        (lambda: BASE.stage(at_row=9, mixture=BASE).compile(SIZES, 9), "from row 9: the run ends at row 9"),
        (lambda: BASE.compile(SIZES, 0), "at least one row, not 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


MIXTURES = [
    Mixture.proportional(),
    Mixture.temperature(0.3, unit="bytes").without("fi", "bg").scale(el=2.5),
    Mixture.unimax(4).only("bg", "fi").scale({"is": 2, "bg": 0.5}),
    Mixture.shares({"fi": 0.25, "bg": 0.75}).stage(at_row=100, mixture=Mixture.proportional()).cap_epochs(3),
    Mixture.temperature(0.5, over="family", within=Mixture.unimax(3, "bytes", over="language")),
    Mixture.unimax(2, unit="content", over="language", within=Mixture.shares({"bg": 0.5, "fi": 0.5})),
    Mixture.shares({"bg": 1}, over="language", within=Mixture.temperature(0)).floor({"bg": 0.1}).floor(0.01),
    Mixture.proportional().floor(0.2, over="family").floor(0.1, over="language").only("bg", "el").only("el", "fi"),
    Mixture.proportional("content").content_premiums({"cnr": 1, "fi": 1.5}).cap_epochs(2, excess="redistribute"),
    Mixture.unimax(1).stage(at_row=10, mixture=Mixture.unimax(2), ramp_rows=5),
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_repr_makes_the_mixture_again(mixture):
    assert eval(repr(mixture)) == mixture


def test_descriptions_are_canonical_and_tell_mixtures_apart():
    texts = [json.dumps(mixture.describe()) for mixture in MIXTURES]
    assert len(set(texts)) == len(texts)
    one = Mixture.shares({"fi": 0.25, "bg": 0.75}).without("el").without("is").scale(fi=2)
    other = Mixture.shares({"bg": 0.75, "fi": 0.25}).scale(fi=2.0).without("is", "el")
    assert one == other
    assert hash(one) == hash(other)
    assert json.dumps(one.describe()) == json.dumps(other.describe())


def test_the_schedules_description_follows_what_is_dealt():
    base = Mixture.shares({"bg": 0.5, "fi": 0.5}).compile(SIZES, 100)
    assert Mixture.shares({"bg": 0.5, "fi": 0.5}).cap_epochs(9).compile(SIZES, 900).describe() == base.describe()
    assert Mixture.shares({"bg": 0.5001, "fi": 0.4999}).compile(SIZES, 100).describe() != base.describe()
    fewer = {name: SIZES[name] for name in ("bg", "fi")}
    assert Mixture.shares({"bg": 0.5, "fi": 0.5}).compile(fewer, 100).describe() == base.describe()
