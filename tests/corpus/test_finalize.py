"""Which documents are duplicates, beside a plain loop over all of them."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eurollm_jax.corpus.preparing.duplicates import later_duplicates

# Units of sources of texts; the same few texts come again and again. Texts 8 and up share their hash's first 8 bytes.
UNITS = st.lists(st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=3), min_size=1, max_size=5)


def digest(text):
    whole = hashlib.sha256(bytes([text])).digest()
    return whole if text < 8 else b"the same" + whole[8:]


@given(UNITS, st.randoms(use_true_random=False))
def test_all_but_the_first_of_equal_hashes_are_found(units, dice):
    numbered, expected, seen = [], [], set()
    for unit in units:
        positions = list(range(sum(map(len, unit))))
        dice.shuffle(positions)  # documents of the sources come in any order, ascending within each
        sources, used = [], 0
        for source in unit:
            sources.append((source, sorted(positions[used : used + len(source)])))
            used += len(source)
        numbered.append(sources)
        in_order = sorted((position, text) for source in sources for text, position in zip(*source, strict=True))
        expected.append([])
        for position, text in in_order:
            if text in seen:
                expected[-1].append(position)
            seen.add(text)

    def hashes(unit):
        for texts, positions in numbered[unit]:
            rows = np.frombuffer(b"".join(map(digest, texts)), np.uint8).reshape(-1, 32)
            yield rows, np.array(positions, np.int64)

    found = later_duplicates([sum(map(len, unit)) for unit in units], hashes)
    assert [dropped.tolist() for dropped in found] == expected
