"""Shards: a source's tokens in files, read by `pread` straight into the caller's memory.

Not mapped into memory, for three reasons: resident memory stays what the program itself holds; a file that is cut short
under a running job is an error with a name and not a SIGBUS; and the kernel reads what is asked for, not what lies
around it.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from eurollm_jax.errors import UserError

OPEN_FILES = 256
"""Most token files that a process keeps open: a store of a hundred sources may have thousands, and the usual limit is
1024."""


class Shards:
    """The token files of one source, as one stream. Opened when first read; safe to share between threads; picklable.

    An entry of `shards` has the `file` (relative to `folder`, or absolute), its number of `tokens`, and the `offset` of
    the first in bytes, 0 where it is not stated.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shards: Sequence[Mapping[str, Any]]) -> None:
        self._arguments = (folder, name, dtype, shards)
        self._name, self._width = name, dtype.itemsize
        self._paths = [folder / shard["file"] for shard in shards]
        self._skip = np.array([shard.get("offset", 0) for shard in shards], np.int64)
        self._bounds = np.cumsum([0, *(shard["tokens"] for shard in shards)], dtype=np.int64)

    def __reduce__(self) -> tuple[type["Shards"], tuple]:
        return Shards, self._arguments

    def read_into(
        self,
        out: np.ndarray,
        places: Int64[np.ndarray, " n"],
        starts: Int64[np.ndarray, " n"],
        lengths: Int64[np.ndarray, " n"],
        after: np.ndarray | None,
    ) -> None:
        """For each i, `lengths[i]` tokens of the stream from `starts[i]` on go to `out[places[i]:]`, and the one that
        follows them to `after[i]`.

        Raises UserError, with the file's name, when a file is gone, cut short or unreadable.
        """
        width = self._width
        room, extra = memoryview(out.view(np.uint8)), 0
        if after is not None:
            more, extra = memoryview(after.view(np.uint8)), 1
        shard = np.minimum(self._bounds.searchsorted(starts, side="right"), len(self._paths)) - 1
        reads = zip(
            shard.tolist(),
            (self._skip[shard] + (starts - self._bounds[shard]) * width).tolist(),
            (places * width).tolist(),
            ((places + lengths) * width).tolist(),
            (starts + lengths + extra <= self._bounds[shard + 1]).tolist(),
            range(len(starts)),
            strict=True,
        )
        opened = -1
        for index, at, begin, end, in_one_file, i in sorted(reads):  # file after file, each from its start on
            if not in_one_file:
                self._read_across(room[begin:end], int(starts[i]))
                if extra:
                    self._read_across(more[i * width : (i + 1) * width], int(starts[i] + lengths[i]))
                continue
            if index != opened:
                file, opened = self._open(index), index
            if extra:
                file.read_into((room[begin:end], more[i * width : (i + 1) * width]), at, end - begin + width)
            else:
                file.read_into((room[begin:end],), at, end - begin)

    def _read_across(self, out: memoryview, start: int) -> None:
        """Fill `out` with the stream from token `start` on, from as many files as it takes."""
        while len(out):
            shard = int(self._bounds.searchsorted(start, side="right")) - 1
            here = min(len(out) // self._width, int(self._bounds[shard + 1]) - start)
            at = int(self._skip[shard]) + (start - int(self._bounds[shard])) * self._width
            self._open(shard).read_into((out[: here * self._width],), at, here * self._width)
            out, start = out[here * self._width :], start + here

    def _open(self, shard: int) -> "_File":
        """The open file, after a look at whether it is still there in its full size."""
        file = _open_file(self, self._paths[shard])
        tokens = int(self._bounds[shard + 1] - self._bounds[shard])
        file.check(int(self._skip[shard]) + tokens * self._width)
        return file


class _File:
    """An open file; closed when the last that refers to it lets go, so never while another thread reads it."""

    def __init__(self, path: Path, source: str) -> None:
        self._path, self._source = path, source
        self._handle = -1
        try:
            try:
                self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                _open_file.cache_clear()  # this process may open fewer files than we would keep
                self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for and nothing ahead
        except OSError as error:
            raise self._unreadable(error) from None

    def __del__(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)

    def check(self, size: int) -> None:
        """UserError if the file was deleted, or has fewer than `size` bytes."""
        try:
            status = os.fstat(self._handle)
        except OSError as error:
            raise self._unreadable(error) from None
        if status.st_nlink == 0:
            raise UserError(f"{self._path} of source {self._source} was deleted while it was read; {_RESTORE}")
        if status.st_size < size:
            raise self._short(status.st_size, size)

    def read_into(self, out: tuple[memoryview, ...], at: int, size: int) -> None:
        """Fill the buffers, `size` bytes in all, one after the other, with the file's bytes from `at` on."""
        try:
            done = os.preadv(self._handle, out, at)
            while 0 < done < size:  # the kernel may stop early; at the end of the file it reads nothing
                more = os.preadv(self._handle, _behind(out, done), at + done)
                if more == 0:
                    break
                done += more
        except OSError as error:
            raise self._unreadable(error) from None
        if done < size:
            raise self._short(at + done, at + size)

    def _unreadable(self, error: OSError) -> UserError:
        return UserError(f"{self._path} of source {self._source} cannot be read ({error.strerror}); {_RESTORE}")

    def _short(self, size: int, wanted: int) -> UserError:
        return UserError(
            f"{self._path} of source {self._source} was cut short: it has {size} bytes and should have at least "
            f"{wanted}; {_RESTORE}"
        )


def _behind(buffers: tuple[memoryview, ...], done: int) -> list[memoryview]:
    """What is left of the buffers behind their first `done` bytes."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[done:])
        done = max(done - len(buffer), 0)
    return rest


_RESTORE = "restore it or prepare the store again, then go on from the last checkpoint"


@lru_cache(maxsize=OPEN_FILES)
def _open_file(shards: Shards, path: Path) -> _File:
    """The least recently used is let go when too many are open. `shards`, the owner, is a key so that a store which was
    written anew at the same path is opened anew."""
    return _File(path, shards._name)
