"""The ids of a text, word by word: each distinct word is encoded once, and looked up from then on.

Running text repeats itself, so that almost all of the work of a tokenizer is done again and again. Holds for a model in
which no piece runs across a space that follows something else, or across a newline.
"""

import re
from array import array
from itertools import accumulate, chain, pairwise
from threading import Lock

import numpy as np
import sentencepiece
from jaxtyping import Int32

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""

_KEPT_WORDS, _KEPT_IDS = 1 << 19, 1 << 22  # about 100 MB
_TAKEN_AT_ONCE = 1 << 13
_AFTER_A_SPACE = re.compile("(?<= ) ")


class Words:
    """The ids of words that were met, so that each is encoded once. Safe to use from several threads.

    A text is cut in front of each space that follows no other and of each newline; a unit never runs across such a
    place. A word is looked up without the space in front of it, as `str.split` returns it; one that begins with a
    newline has none.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor, self._lock = processor, Lock()
        self._newline = len(processor.encode("\n"))
        self._clear()

    def _clear(self) -> None:
        self._numbers = _Numbers()
        self._ids = array("i")  # of all words one after the other
        self._ends = array("q", [0])  # where in them each word's end

    def encode(self, texts: list[str], threads: int) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of each text, as views of one array. No text holds U+2581."""
        words = [_split(text) for text in texts]
        with self._lock:
            if len(self._numbers) > _KEPT_WORDS or len(self._ids) > _KEPT_IDS:
                self._clear()
            try:
                numbers = np.fromiter(map(self._numbers.__getitem__, chain.from_iterable(words)), np.int64)
                self._learn(threads)
                ids, lengths = self._look_up(numbers)
            except BaseException:  # words without ids must not stay
                self._clear()
                raise
        ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *map(len, words)])].tolist()
        # Each text was given a newline in front.
        return [ids[start + self._newline : end] for start, end in pairwise(ends)]

    def _learn(self, threads: int) -> None:
        """Encode the words that are new."""
        new, self._numbers.new = self._numbers.new, []
        if not new:
            return
        units = [word if word.startswith("\n") else " " + word for word in new]
        encoded = self._processor.encode(units, num_threads=threads)
        self._ids.extend(chain.from_iterable(encoded))
        self._ends.extend(accumulate(map(len, encoded[1:]), initial=self._ends[-1] + len(encoded[0])))

    def _look_up(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the words of these numbers, one after the other, and how many each has."""
        word_ends = np.frombuffer(self._ends, np.int64)
        starts = word_ends[numbers]
        lengths = word_ends[numbers + 1] - starts
        return take(np.frombuffer(self._ids, np.int32), starts, lengths), lengths


class _Numbers(dict[str, int]):
    """Word -> its number; a new one gets the next and is listed in `new`."""

    def __init__(self) -> None:
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self.new.append(word)
        self[word] = number = len(self)
        return number


def _split(text: str) -> list[str]:
    if "  " in text:  # of several spaces the first separates, the others are written as SentencePiece does
        text = _AFTER_A_SPACE.sub(SPACE_MARK, text)
    return ("\n" + text.replace("\n", " \n")).split(" ")


def take(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[start : start + length] for each of the starts, one after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    shifts = starts - (ends - lengths)
    taken = np.empty(ends[-1] if len(ends) else 0, values.dtype)
    done = 0
    for first in range(0, len(starts), _TAKEN_AT_ONCE):  # in amounts that stay in the cache
        some = slice(first, first + _TAKEN_AT_ONCE)
        stop = int(ends[some][-1])
        places = np.repeat(shifts[some], lengths[some])
        places += np.arange(done, stop)
        taken[done:stop] = values[places]
        done = stop
    return taken
