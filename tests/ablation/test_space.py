"""The space of a study: what its groups, prior and baselines come to, by hand and in fractions; and what is refused."""

import logging
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from eurollm_jax.ablation.space import build_space, open_space
from eurollm_jax.ablation.study import Confirmation, Constraints
from eurollm_jax.data.groups import SourceSize
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.errors import UserError
from eurollm_jax.training.inputs import open_inputs

# Rows of 100 tokens.
SIZES = {
    "bg": SourceSize(30_000, 90_000, 300, "bg"),
    "de": SourceSize(50_000, 150_000, 500, "de"),
    "en": SourceSize(80_000, 160_000, 800, "en"),
    "fi/news": SourceSize(20_000, 50_000, 200, "fi"),
    "fi/web": SourceSize(40_000, 90_000, 400, "fi"),
    "mt": SourceSize(1_000, 3_000, 10, "mt"),
}
GROUPS = {"North": ("de", "en", "fi"), "South": ("mt", "bg")}
HELDOUT = ("bg", "de", "en", "fi")
TOKENS = {name: Fraction(size.tokens) for name, size in SIZES.items()}


@pytest.fixture
def asked(study):
    """A study over `SIZES`, whose prior is proportional."""
    return replace(study, groups=GROUPS, prior=Mixture.proportional("tokens"))


@pytest.fixture
def plain(asked):
    return build_space(asked, SIZES, HELDOUT)


def test_groups_hold_their_sources_as_the_prior_has_them(asked):
    space = build_space(asked, SIZES, HELDOUT)
    assert space.groups == ("North", "South")
    total = sum(TOKENS.values())
    south = TOKENS["bg"] + TOKENS["mt"]
    assert space.prior == pytest.approx([float(1 - south / total), float(south / total)], abs=1e-7)
    assert space.within[1] == pytest.approx({"bg": 30 / 31, "mt": 1 / 31}, abs=1e-6)
    assert space.within[0] == pytest.approx({"de": 50 / 190, "en": 80 / 190, "fi/news": 2 / 19, "fi/web": 4 / 19})
    np.testing.assert_allclose(space.holds, [[0, 30 / 31], [50 / 190, 0], [80 / 190, 0], [6 / 19, 0]], atol=1e-6)
    np.testing.assert_array_equal(space.lower, [0, 0])
    np.testing.assert_array_equal(space.upper, [1, 1])
    np.testing.assert_allclose(space.weights, 4 * [0.25])


def test_the_prior_of_rows_of_unlike_length_is_in_tokens(asked):
    """A tenth of each row of en is padding."""
    sizes = {**SIZES, "en": SourceSize(72_000, 144_000, 800, "en")}
    prior = Mixture.shares({"de": 0.2, "en": 0.5, "bg": 0.3}, "tokens")
    space = build_space(replace(asked, prior=prior), sizes, HELDOUT)
    np.testing.assert_allclose(space.prior, [0.7, 0.3], atol=1e-8)
    schedule = space.mixture(space.prior).compile(sizes, 1000)
    assert schedule == prior.compile(sizes, 1000)


def test_of_a_prior_with_stages_the_mean_counts(asked, caplog):
    rows = asked.proxy.total_rows
    first, second = {"en": 0.8, "bg": 0.2}, {"en": 0.4, "bg": 0.6}
    prior = Mixture.shares(first, "tokens").stage(at_row=rows // 4, mixture=Mixture.shares(second, "tokens"))
    with caplog.at_level(logging.INFO):
        space = build_space(replace(asked, prior=prior), SIZES, HELDOUT)
    np.testing.assert_allclose(space.prior, [0.5, 0.5], atol=1e-8)
    assert "the prior has 2 stages: its mean" in caplog.text


@pytest.mark.parametrize(
    ("level", "groups"),
    [
        ("family", ("Germanic", "Semitic", "Slavic", "Uralic")),
        ("language", ("bg", "de", "en", "fi", "mt")),
        ("source", ("bg", "de", "en", "fi/news", "fi/web", "mt")),
    ],
)
def test_groups_of_a_level(asked, level, groups):
    space = build_space(replace(asked, groups=level), SIZES, HELDOUT)
    assert space.groups == groups
    without = build_space(
        replace(asked, groups=level, prior=Mixture.proportional("tokens").without("mt")), SIZES, HELDOUT
    )
    assert set(groups) - set(without.groups) == {"Semitic" if level == "family" else "mt"}


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.97])
def test_a_mixture_gives_each_group_its_share_of_the_tokens(plain, share):
    schedule = plain.mixture([share, 1 - share]).compile(SIZES, 1000)
    rows = dict(zip(schedule.names, schedule.stages[0].shares, strict=True))
    assert sum(rows[name] for name in plain.within[0]) / sum(rows.values()) == pytest.approx(share, abs=1e-8)
    for members in plain.within:
        total = sum(rows[name] for name in members)
        assert {name: rows[name] / total for name in members} == pytest.approx(dict(members), rel=1e-4)


def test_a_group_without_a_share_is_left_out_of_the_mixture_and_so_is_a_trace(plain):
    space = plain
    assert space.mixture([1, 0]).compile(SIZES, 100).scheduled == (1, 2, 3, 4)
    assert space.mixture([1 - 1e-9, 1e-9]) == space.mixture([1, 0])
    for wrong in ([0.5, 0.4], [1], [1.5, -0.5]):
        with pytest.raises(ValueError, match="no shares of 2 groups"):
            space.mixture(wrong)


def test_weights_of_the_target(asked):
    weights = lambda targets, held=HELDOUT: build_space(replace(asked, targets=targets), SIZES, held).weights  # noqa: E731
    np.testing.assert_allclose(weights({"bul": 3, "fi": 1, "de": 0}), [0.75, 0, 0, 0.25])
    np.testing.assert_allclose(weights("official", ("bg", "ca", "fi")), [0.5, 0, 0.5])
    np.testing.assert_allclose(weights("uniform", ("bg", "ca", "fi")), [1 / 3] * 3)


def test_baselines_are_the_rules_by_hand(plain):
    """Temperatures go over languages, so that Finnish counts once; UniMax fills up Maltese and shares out the rest."""
    found = plain.baselines(50_000)
    assert list(found) == ["proportional", "temperature 0.3", "temperature 0.7", "UniMax", "prior"]
    languages = {"bg": 30_000, "de": 50_000, "en": 80_000, "fi": 60_000, "mt": 1_000}
    for name, alpha in (("proportional", 1.0), ("temperature 0.3", 0.3), ("temperature 0.7", 0.7)):
        powers = {code: tokens**alpha for code, tokens in languages.items()}
        south = (powers["bg"] + powers["mt"]) / sum(powers.values())
        np.testing.assert_allclose(found[name], [1 - south, south], atol=1e-6)
    mt = 4 * 1_000
    south = (mt + (50_000 - mt) / 4) / 50_000
    np.testing.assert_allclose(found["UniMax"], [1 - south, south], atol=1e-4)
    np.testing.assert_array_equal(found["prior"], plain.prior)


def test_a_baseline_beyond_the_bounds_is_moved_and_named_and_an_impossible_one_left_out(asked, caplog):
    constraints = Constraints(ceilings={"South": 0.2}, max_epochs=3)
    space = build_space(replace(asked, constraints=constraints), SIZES, HELDOUT)
    found = space.baselines(50_000)
    np.testing.assert_allclose(found["temperature 0.3 (within bounds)"], [0.8, 0.2])
    assert "proportional" in found
    np.testing.assert_array_equal(space.baseline("temperature 0.3", 50_000), found["temperature 0.3 (within bounds)"])
    with pytest.raises(UserError, match="no baseline 'UniMaxx' for this study: it has proportional, "):
        space.baseline("UniMaxx", 50_000)
    assert "UniMax" not in space.baselines(700_000)
    assert "the baseline UniMax is left out: mixture: unimax(3) can fill 6,630 rows" in caplog.text


def test_a_source_without_a_language_leaves_out_the_baselines_over_languages(asked, caplog):
    sizes = {**SIZES, "code": SourceSize(9_000, 9_000, 90, "")}
    found = build_space(replace(asked, groups={**GROUPS, "code": ("code",)}), sizes, HELDOUT).baselines(50_000)
    assert list(found) == ["proportional", "prior"]
    assert "'code' has the language ''" in caplog.text


def test_caps_hold_for_the_longest_of_the_proxies_the_confirmation_and_the_run_that_is_meant(asked):
    proxy = asked.proxy.total_rows * 100  # 9,600 tokens; mt is 1/31 of its group
    for tokens, constraints, confirmation in (
        (proxy, Constraints(max_epochs=0.25), None),
        (proxy, Constraints(max_epochs=0.25, tokens=1_000), None),
        (20_000, Constraints(max_epochs=0.25, tokens=20_000), None),
        (12_800, Constraints(max_epochs=0.25), Confirmation(replace(asked.proxy, steps=50))),
        (12_800, Constraints(max_epochs=0.25, tokens=1_000), Confirmation(replace(asked.proxy, steps=50))),
        (20_000, Constraints(max_epochs=0.25, tokens=20_000), Confirmation(replace(asked.proxy, steps=50))),
    ):
        space = build_space(replace(asked, constraints=constraints, confirmation=confirmation), SIZES, HELDOUT)
        np.testing.assert_allclose(space.upper[1], 0.25 * 31_000 / tokens, rtol=1e-4)


def test_what_the_bounds_allow_compiles_under_the_cap_whatever_rows_hold(asked):
    """Rows of unlike length: the bound holds for the fullest."""
    sizes = {**SIZES, "en": SourceSize(60_000, 144_000, 800, "en")}
    constraints = Constraints(max_epochs=0.2)
    space = build_space(replace(asked, constraints=constraints), sizes, HELDOUT)
    share = space.upper[1]
    assert share < 1
    rows = asked.proxy.total_rows
    space.mixture([1 - share, share]).cap_epochs(0.2).compile(sizes, rows)
    with pytest.raises(UserError, match="is exceeded"):
        space.mixture([1 - 1.4 * share, 1.4 * share]).cap_epochs(0.2).compile(sizes, rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(groups="script"), "groups is 'family', 'language' or 'source', or names by group, not 'script'"),
        (dict(groups={"A": "fi", "B": ("en",)}), r"groups: 'A' is the text 'fi': write \('fi',\)"),
        (
            dict(groups={"A": ("de", "en"), "B": ("Germanic", "bg")}),
            "groups: 'A' and 'B' both have de, en: take it out of one",
        ),
        (dict(groups={"A": ("de", "eng"), "B": ("bg",)}), "groups: 'A' names the source 'eng', which .* mean 'en'"),
        (dict(groups={"A": ("Germanic",), "B": ("fi/newz",)}), "groups: 'B' names the source 'fi/newz'.*'fi/news'"),
        (
            dict(groups={"A": ("Germanic", "fi"), "B": ("bg",)}),
            r"no group has 'mt' \(Maltese\), and the prior gives it 0.45% of the tokens: add it to a group",
        ),
        (dict(groups={"A": ("Germanic",), "B": ("bg",)}), r"no group has 'fi/news' \(Finnish\), 'fi/web'.* gives them"),
        (
            dict(prior=Mixture.proportional("tokens").without("bg", "mt")),
            "the prior gives 'South' 0 of the tokens, and at least 0.0001 is needed: drop the group",
        ),
        (dict(groups={"all": tuple(SIZES)}), "groups: all is all there is, and shares need two groups"),
        (dict(groups={}), "no group has 'bg'"),
        (dict(prior=Mixture.shares({"xx": 1.0})), "mixture names the source 'xx', which the store lacks"),
        (dict(targets="European"), "targets is 'uniform' or 'official', or weights by language, not 'European'"),
        (dict(targets={"mt": 1.0}), "targets: 'mt' has no held-out text: hold some out, .* in bg, de, en, fi"),
        (dict(targets={"xx": 1.0}), "targets: unknown language 'xx'"),
        (dict(targets={"bg": 1.0, "bul": 1.0}), "targets: 'bg' and 'bul' are one language"),
        (dict(targets={"bg": -1.0}), "targets: 'bg' has the weight -1.0: give 0 or more"),
        (dict(targets={"bg": 0.0}), "targets: the weights sum to 0"),
        (dict(targets={}), "targets: the weights sum to 0"),
        (dict(constraints=Constraints(max_epochs=0)), "max_epochs=0 must be above 0"),
        (dict(constraints=Constraints(tokens=0)), "tokens=0 must be 1 or more"),
        (dict(constraints=Constraints(floors={"East": 0.1})), "floors names 'East', which is no group"),
        (
            dict(
                prior=Mixture.proportional("tokens").scale(mt=2),
                constraints=Constraints(max_epochs=4, tokens=10**6),
            ),
            r"reads 'mt' of the group 'South' 9.01 times .* \(and 1 more of the groups break it\): max_epochs=9.01",
        ),
    ],
)
def test_refusals(asked, changes, message):
    with pytest.raises(UserError, match=f"study 'tiny': .*{message}"):
        build_space(replace(asked, **changes), SIZES, HELDOUT)


def test_official_targets_need_official_text(asked, caplog):
    with pytest.raises(UserError, match="no official language is held out"):
        build_space(replace(asked, targets="official"), SIZES, ("ca", "nn"))
    build_space(replace(asked, targets="official"), SIZES, HELDOUT)
    assert "which the target leaves out: cs, da, el" in caplog.text


@pytest.mark.parametrize("targets", ["uniform", "official", {"mt": 1.0, "el": 3.0, "fr": 0.0}])
def test_text_that_is_trained_on_or_measured_alone_is_told_of(asked, caplog, targets):
    """By group; of held-out languages, those that the target counts."""
    sizes = {**SIZES, "code": SourceSize(9_000, 9_000, 90, "")}
    groups = {**GROUPS, "code": ("code",)}
    build_space(replace(asked, groups=groups, targets=targets), sizes, ("el", "fr", "mt"))
    said = "so the target does not count what is learnt of them: de, en, fi of North; bg of South; 'code' of code"
    assert said in caplog.text
    unread = "el, fr" if isinstance(targets, str) else "el"
    weight = 67 if isinstance(targets, str) else 75
    assert f"that the target counts ({weight}% of its weight) and that no group trains on: {unread}\n" in caplog.text
    caplog.clear()
    build_space(replace(asked, targets="uniform"), SIZES, sorted({size.language for size in SIZES.values()}))
    assert not caplog.text


def test_a_space_over_stores(study, space):
    """The store of tests/conftest.py: Bulgarian is trained on and not held out."""
    assert space.languages == ("de", "el", "en", "mt")
    assert [sorted(members) for members in space.within] == [["de", "en"], ["bg"], ["el", "mt"]]
    assert space.holds.sum(axis=0) == pytest.approx([1, 0, 1])
    assert space.prior.sum() == pytest.approx(1)
    inputs = open_inputs(study.proxy)
    mixture = space.mixture(space.prior)
    assert mixture.compile(space.sizes, 96) == study.proxy.data.mixture.compile(inputs.data.sizes, 96)


def test_stores_of_unlike_tokenizers_are_refused(study):
    inputs = open_inputs(study.proxy)

    class Other:
        path = "held/out"
        tokenizer_sha256 = "f00d"

    with pytest.raises(UserError, match="and held/out were prepared with different tokenizers: prepare one of them"):
        open_space(study, inputs.data, replace(inputs.heldout, store=Other()))
