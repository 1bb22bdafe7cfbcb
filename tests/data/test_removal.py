"""Removed documents are padding from a stated row on; nothing else moves."""

import functools
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.megatron import export_megatron
from eurollm_jax.corpus.megatron_import import import_megatron
from eurollm_jax.data.batch import Batch
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture
from eurollm_jax.data.packing import PAD_ID
from eurollm_jax.data.removal import Removal
from eurollm_jax.errors import UserError

MIXTURE = Mixture.temperature(0.5)
LENGTH = 32


def config_of(store, *removed, packing="concat"):
    return DataConfig(str(store.path), MIXTURE, LENGTH, seed=2, packing=packing, removed=removed)


@functools.cache
def names_of(store, name, index):
    document = store.sources[name].document(index)
    return document.sha256, document.url


def listed(path, store, documents):
    """A block list of `documents`, (source, index) pairs: by hash, and every other one by URL where it has one."""
    lines = ["# requested by their authors"]
    for number, (name, index) in enumerate(documents):
        sha256, url = names_of(store, name, index)
        lines.append(url if number % 2 and url else sha256)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def without(batch, data, rows, removed, from_row):
    """The batch with the documents taken out, place by place, from the packing's own account of its rows."""
    fields = [field.copy() for field in batch]
    tokens, targets, segments, positions, mask, _ = fields
    sources, _, rows_in_source = data.order.rows(rows)
    for i, (k, source, row) in enumerate(zip(rows.tolist(), sources.tolist(), rows_in_source.tolist(), strict=True)):
        if k < from_row:
            continue
        for span in data.packings[source].documents(row):
            stream = data.packings[source].source
            size = int(stream.offsets[span.document + 1] - stream.offsets[span.document])
            for at in range(span.tokens):
                place, token = span.place + at, span.first + at
                name = data.source_names[source]
                if (name, span.document) in removed:
                    tokens[i, place], segments[i, place], positions[i, place] = PAD_ID, 0, 0
                    mask[i, place] = False
                # A document's last token is an input in concat alone, and its target is the first of the next document.
                if (name, span.document + (token + 1 == size)) in removed:
                    targets[i, place], mask[i, place] = PAD_ID, False
    return Batch(*fields)


def assert_equal(one, other):
    for name, a, b in zip(Batch._fields, one, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_removed_documents_are_padding_and_all_else_stays_byte_identical(tmp_path_factory, store, packing, data):
    pairs = st.tuples(st.sampled_from(list(store.sources)), st.integers(0, 149))
    chosen = data.draw(st.lists(pairs, max_size=60, unique=True))
    if data.draw(st.booleans()):  # all of a source, so that documents side by side are removed
        chosen = list({*chosen, *(("mt", index) for index in range(150))})
    from_row = data.draw(st.integers(0, 120))
    path = listed(tmp_path_factory.mktemp("list") / "list.txt", store, chosen)
    plain = open_data(config_of(store, packing=packing), 1000)
    removing = open_data(config_of(store, Removal(path, from_row), packing=packing), 1000)
    assert removing.removed[0].documents == len(chosen)
    removed = set(chosen)
    for first in (0, 48, 96, 10**6):
        expected = without(plain.batch(first, 48), plain, plain.order.batch_rows(first, 48), removed, from_row)
        assert_equal(removing.batch(first, 48), expected)
        parts = [removing.batch(first, 48, host, 3) for host in range(3)]
        assert_equal(Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True))), expected)


def test_an_epoch_has_none_of_the_removed_tokens_and_all_others(tmp_path, store):
    """Counted: what an epoch predicts with a removal is what it predicts without, less the documents' predictions."""
    chosen = [("en", index) for index in range(0, 150, 7)]
    config = DataConfig(str(store.path), Mixture.proportional().only("en"), LENGTH)
    path = listed(tmp_path / "list.txt", store, chosen)
    both = [config, DataConfig(config.store, config.mixture, LENGTH, removed=(Removal(path, 0),))]
    plain, removing = (open_data(each, 100) for each in both)
    rows = plain.sizes["en"].rows
    counts = [sum(int(data.batch(row, 1).mask.sum()) for row in range(rows)) for data in (plain, removing)]
    offsets = store.sources["en"].offsets
    found = removing.removed[0]
    assert counts[0] - counts[1] == sum(int(offsets[i + 1] - offsets[i]) - 1 for _, i in chosen)
    assert found.documents == len(chosen)
    assert found.tokens == sum(int(offsets[i + 1] - offsets[i]) for _, i in chosen)
    held = {
        row
        for row in range(rows)
        if {s.document for s in plain.packings[plain.source_names.index("en")].documents(row)} & {i for _, i in chosen}
    }
    assert found.rows_hit(removing.packings, list(removing.sources.values())) == len(held)


def test_two_removals_take_effect_each_from_its_own_row(tmp_path, store):
    first, second = [("bg", 3), ("de", 9)], [("bg", index) for index in range(100)]
    paths = [listed(tmp_path / f"{n}.txt", store, chosen) for n, chosen in enumerate((first, second))]
    plain = open_data(config_of(store), 1000)
    both = open_data(config_of(store, Removal(paths[0], 10), Removal(paths[1], 70)), 1000)
    for row in (0, 48, 96):
        rows = plain.order.batch_rows(row, 48)
        expected = without(plain.batch(row, 48), plain, rows, set(first), 10)
        assert_equal(both.batch(row, 48), without(expected, plain, rows, set(second), 70))


def test_a_run_may_add_removals_that_begin_where_it_resumes_and_no_earlier(tmp_path, store):
    path = listed(tmp_path / "list.txt", store, [("en", 3), ("mt", 4), ("mt", 5)])
    plain, from_50, from_90 = (
        open_data(config_of(store, *removed), 1000) for removed in [(), (Removal(path, 50),), (Removal(path, 90),)]
    )
    before, after = (json.loads(json.dumps(data.describe())) for data in (plain, from_50))
    assert before != after
    from_50.require_same(before, 50)
    from_50.require_same(after, 1000)
    with pytest.raises(UserError, match=r"the removal of 3 documents from row 50 on .* would begin before row 51"):
        from_50.require_same(before, 51)
    plain.require_same(after, 50)  # it has not taken effect yet
    with pytest.raises(UserError, match=r"the removal of 3 documents from row 50 on .* took effect and is gone;"):
        plain.require_same(after, 51)
    from_90.require_same(after, 50)
    with pytest.raises(UserError, match=r"from row 50 on .* took effect and is gone; restore"):
        from_90.require_same(after, 90)
    with open(path, "a") as file:  # another list under the same name is another removal
        file.write(store.sources["bg"].document(0).sha256 + "\n")
    changed = open_data(config_of(store, Removal(path, 50)), 1000)
    with pytest.raises(UserError, match=r"removal of 3 documents .* is gone; the removal of 4 documents .* is new"):
        changed.require_same(after, 60)


def test_the_log_says_what_is_removed_and_loudly_when_it_is_nothing(tmp_path, store, caplog):
    path = listed(tmp_path / "list.txt", store, [("en", 3), ("mt", 4)])
    nothing = tmp_path / "nothing.txt"
    nothing.write_text("0" * 64 + "\n")
    with caplog.at_level(logging.INFO):
        found = open_data(config_of(store, Removal(path, 7)), 1000).removed[0]
        none = open_data(config_of(store, Removal(str(nothing), 7)), 1000)
    said, warned = (record for record in caplog.records if record.name == "eurollm_jax.data.removal")
    assert f"from row 7 on, 2 documents ({found.tokens} tokens, in " in said.getMessage()
    assert "nothing.txt names no document that the run reads: NOTHING IS REMOVED" in warned.getMessage()
    assert warned.levelno == logging.WARNING
    assert_equal(none.batch(50, 16), open_data(config_of(store), 1000).batch(50, 16))


def test_a_removal_that_cannot_be_searched_for_in_all_that_is_read_stops_the_run(tmp_path, store, tokenizer):
    """What is to be removed may be in Megatron files, which do not say; a run without them is not concerned."""
    export_megatron(store.sources["mt"], tmp_path / "ga")
    megatron = import_megatron([tmp_path / "ga"], tokenizer, tmp_path / "megatron", names=["ga"], languages=["ga"])
    removal = Removal(listed(tmp_path / "list.txt", store, [("en", 3), ("mt", 4)]), 5)
    both = (str(store.path), str(megatron.path))
    with pytest.raises(UserError, match=r"list\.txt cannot be applied to source ga: .* or leave it out of the mixture"):
        open_data(DataConfig(both, MIXTURE, LENGTH, removed=(removal,)), 1000)
    without_it = open_data(DataConfig(both, MIXTURE.without("ga"), LENGTH, removed=(removal,)), 1000)
    assert without_it.removed[0].documents == 2
    half = open_data(DataConfig(both, MIXTURE.without("ga", "mt"), LENGTH, removed=(removal,)), 1000)
    assert half.removed[0].documents == 1


def test_bad_removals_are_refused(tmp_path, store):
    with pytest.raises(UserError, match=r"no block-list at .*missing\.txt"):
        open_data(config_of(store, Removal(str(tmp_path / "missing.txt"), 0)), 10)
    with pytest.raises(UserError, match="begins at row -1; give row 0"):
        open_data(config_of(store, Removal(str(tmp_path / "missing.txt"), -1)), 10)
