"""Token sources in memory: what packing and the loader read of a store, without one."""

from dataclasses import dataclass

import numpy as np
import pytest

BOS, EOS = 1, 2


@dataclass
class MemorySource:
    name: str
    stream: np.ndarray
    offsets: np.ndarray

    @property
    def tokens(self):
        return len(self.stream)

    @property
    def language(self):
        return self.name

    @property
    def bytes(self):
        return 3 * len(self.stream)

    @property
    def dtype(self):
        return self.stream.dtype

    def read(self, start, stop):
        assert 0 <= start <= stop <= len(self.stream)
        return self.stream[start:stop]

    def read_into(self, out, places, starts, lengths, after):
        reads = zip(places.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for i, (place, start, length) in enumerate(reads):
            out[place : place + length] = self.read(start, start + length)
            after[i] = self.stream[start + length]


@dataclass
class MemoryStore:
    sources: dict
    fingerprint: str = "f00d"


def make_source(name, lengths, seed=0):
    """Documents of the given numbers of tokens; a bos starts each, an eos ends it if there is room."""
    generator = np.random.default_rng([seed, *name.encode()])
    documents = [generator.integers(4, 1000, length).astype(np.uint16) for length in lengths]
    for document in documents:
        document[-1], document[0] = EOS, BOS
    return MemorySource(name, np.concatenate(documents), np.cumsum([0, *lengths]))


@pytest.fixture(scope="session", name="make_source")
def source_factory():
    return make_source


@pytest.fixture(scope="session")
def memory_store():
    """Seven languages, from one row of 16 tokens to hundreds."""
    generator = np.random.default_rng(0)
    documents = {"bg": 300, "cs": 120, "el": 60, "fi": 40, "ga": 10, "is": 3, "mt": 1}
    return MemoryStore(
        {name: make_source(name, generator.integers(2, 60, n).tolist()) for name, n in documents.items()}
    )
