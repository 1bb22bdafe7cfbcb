import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.data.packing import PAD_ID, ConcatPacking, pack


def rows_of_one(packing, rows):
    rows = np.array(rows, np.int64)
    return pack([packing], np.zeros_like(rows), rows)


def by_hand(source, length, row):
    """One row, a token at a time, straight from the definition."""
    stream, starts = source.stream.tolist(), set(source.offsets.tolist()[:-1])
    fields = {name: [] for name in ("tokens", "targets", "segments", "positions", "mask")}
    segment, position = 1, 0
    for at in range(row * length, (row + 1) * length):
        if at in starts and at > row * length:
            segment, position = segment + 1, 0
        inside = at + 1 < len(stream)  # the stream's last token is a target only
        fields["tokens"].append(stream[at] if inside else PAD_ID)
        fields["targets"].append(stream[at + 1] if inside else PAD_ID)
        fields["segments"].append(segment if inside else 0)
        fields["positions"].append(position if inside else 0)
        fields["mask"].append(inside and at + 1 not in starts)
        position += 1
    return fields


def sources(make_source):
    """Random sources: documents of one token, documents longer than many rows, and all between."""
    lengths = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 90)), min_size=1, max_size=25)
    return st.builds(make_source, st.just("bg"), lengths, st.integers(0, 99))


@settings(deadline=None)
@given(st.data(), st.integers(1, 17))
def test_rows_equal_a_plain_re_implementation(make_source, data, length):
    packing = ConcatPacking(data.draw(sources(make_source)), length)
    rows = data.draw(st.lists(st.integers(0, packing.rows - 1), max_size=7) if packing.rows else st.just([]))
    packed = rows_of_one(packing, rows)
    by_row = [by_hand(packing.source, length, row) for row in rows]
    for name, field in packed._asdict().items():
        if name == "source":
            assert field.tolist() == [0] * len(rows)
            continue
        expected = np.array([row[name] for row in by_row]).reshape(len(rows), length)
        np.testing.assert_array_equal(field, expected, err_msg=name)
        assert field.dtype == (np.bool_ if name == "mask" else np.int32)


@settings(deadline=None)
@given(st.data(), st.integers(1, 17))
def test_an_epoch_predicts_every_token_once_but_the_first_of_each_document(make_source, data, length):
    source = data.draw(sources(make_source))
    packing = ConcatPacking(source, length)
    packed = rows_of_one(packing, range(packing.rows))
    first = np.zeros(source.tokens, np.bool_)
    first[source.offsets[:-1]] = True
    np.testing.assert_array_equal(packed.targets[packed.mask], source.stream[~first])


@settings(deadline=None)
@given(st.data(), st.integers(1, 17))
def test_documents_and_rows_are_inverse(make_source, data, length):
    source = data.draw(sources(make_source))
    packing = ConcatPacking(source, length)
    packed = rows_of_one(packing, range(packing.rows))
    rows_with = {document: [] for document in range(len(source.offsets) - 1)}
    for row in range(packing.rows):
        spans = packing.documents(row)
        assert [span.place for span in spans] == [0, *np.cumsum([span.tokens for span in spans])[:-1]][: len(spans)]
        for number, span in enumerate(spans, 1):
            rows_with[span.document].append(row)
            text = source.stream[source.offsets[span.document] :][span.first : span.first + span.tokens]
            assert span.first + span.tokens <= np.diff(source.offsets)[span.document]
            np.testing.assert_array_equal(packed.tokens[row][span.place :][: span.tokens], text)
            np.testing.assert_array_equal(
                np.flatnonzero(packed.segments[row] == number), span.place + np.arange(span.tokens)
            )
    assert rows_with == {document: list(packing.rows_of(document)) for document in rows_with}


def test_a_document_of_many_rows_restarts_its_positions_in_each(make_source):
    packing = ConcatPacking(make_source("mt", [100, 5]), 16)
    packed = rows_of_one(packing, [3])
    assert packed.positions.tolist() == [list(range(16))]
    assert packed.segments.tolist() == [[1] * 16]
    assert packed.mask.all()


@pytest.mark.parametrize("row", [-1, 7])
def test_rows_and_documents_outside_are_refused(make_source, row):
    packing = ConcatPacking(make_source("mt", [100]), 16)
    assert packing.rows == 7
    for ask in (packing.documents, packing.rows_of, lambda row: rows_of_one(packing, [0, row])):
        with pytest.raises(IndexError):
            ask(row)
