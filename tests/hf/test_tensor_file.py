"""Our files of tensors beside the safetensors library: each reads what the other writes and refuses what it refuses."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.errors import UserError
from eurollm_jax.hf.tensor_file import TensorFile, write_tensor_file

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
SHAPES = {"b.weight": (3, 5), "a": (7,), "none": (0, 4), "one": (), "deep": (2, 3, 1, 4), 'ü "\\': (2,)}


def values_of(dtype, shapes=SHAPES):
    dice = np.random.default_rng(0)
    return {name: dice.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def written(path, values, dtype):
    digest = write_tensor_file(path, {name: value.shape for name, value in values.items()}, dtype, values.values())
    assert digest == file_sha256(path)
    return path


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_library_reads_what_we_write(dtype, tmp_path):
    values = values_of(dtype)
    path = written(tmp_path / "file", values, dtype)
    assert_equal(safetensors.numpy.load_file(path), values)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_read_what_the_library_writes(dtype, tmp_path):
    values = values_of(dtype)
    safetensors.numpy.save_file(values, tmp_path / "file", {"format": "pt", "more": "words"})
    file = TensorFile(tmp_path / "file")
    assert_equal({name: file.read(name) for name in file.entries}, values)


def test_types_may_be_mixed_and_those_that_are_not_floats_are_named_and_not_read(tmp_path):
    values = {"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16), "c": np.arange(4), "d": np.ones(3, bool)}
    safetensors.numpy.save_file(values, tmp_path / "file")
    file = TensorFile(tmp_path / "file")
    assert {name: entry.dtype for name, entry in file.entries.items()} == dict(a="F32", b="F16", c="I64", d="BOOL")
    assert_equal({name: file.read(name) for name in ("a", "b")}, {name: values[name] for name in ("a", "b")})
    with pytest.raises(UserError, match="c is stored as I64, and only F32, F16, BF16 are supported"):
        file.read("c")


def test_any_slices_are_those_of_the_whole(tmp_path):
    dice = np.random.default_rng(3)
    values = values_of(np.dtype(ml_dtypes.bfloat16))
    file = TensorFile(written(tmp_path / "file", values, np.dtype(ml_dtypes.bfloat16)))
    for _ in range(60):
        for name, value in values.items():
            slices = tuple(
                slice(None) if dice.random() < 0.2 else slice(*map(int, dice.integers(-size - 1, size + 2, 2)))
                for size in value.shape
            )
            np.testing.assert_array_equal(file.read(name, slices), value[slices], err_msg=f"{name} {slices}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([np.ones(3, np.float32)], r"expected \(2,\) float32, not \(3,\) float32"),
        ([np.ones(2)], r"expected \(2,\) float32, not \(2,\) float64"),
        ([], "shorter"),
        ([np.ones(2, np.float32)] * 2, "longer"),
    ],
)
def test_values_that_are_not_what_was_announced_are_no_file(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_tensor_file(tmp_path / "file", {"a": (2,)}, np.dtype(np.float32), values)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "file"
    values = values_of(np.dtype(np.float32), {"a": (3, 5), "b.weight": (7,), "c": (2, 2)})
    return written(path, values, np.dtype(np.float32)).read_bytes()


def read_all(path):
    """Everything in the file as we read it, or the words of the refusal."""
    try:
        file = TensorFile(path)
        return {name: file.read(name) for name in file.entries}
    except UserError as error:
        return str(error)


def library_reads(path):
    try:
        return safetensors.numpy.load_file(path)
    except (SafetensorError, KeyError, UnicodeDecodeError, OSError, ValueError, TypeError, AttributeError):
        return None


def test_a_file_cut_short_anywhere_is_refused(content, tmp_path):
    path = tmp_path / "file"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert isinstance(read_all(path), str), length
    path.write_bytes(content + b"\0")
    assert isinstance(read_all(path), str)


def test_a_flipped_byte_of_the_header_is_refused_or_harmless_as_it_is_to_the_library(content, tmp_path):
    """Where the library still reads a file, so do we, and the same; where it refuses, we refuse."""
    path = tmp_path / "file"
    whole = 8 + int.from_bytes(content[:8], "little")
    dice = np.random.default_rng(0)
    refused = 0
    for at in range(whole):
        flips = {1 << bit for bit in range(8)} | {0xFF} | set(map(int, dice.integers(1, 256, 3)))
        for flip in flips:
            path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
            ours, theirs = read_all(path), library_reads(path)
            if isinstance(ours, str):
                refused += 1
                # what we do not store models in we do not read, though the library may
                assert theirs is None or "only F32, F16, BF16 are supported" in ours, (at, flip, ours)
            else:
                assert theirs is not None, (at, flip)
                assert_equal(ours, theirs)
    assert refused > 5 * whole


def with_header(header, data=b"\0" * 24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


DAMAGED = [
    ({"a": entry(0, 16), "b": entry(8, 24)}, "b does not begin where the tensor before it ends"),
    ({"a": entry(0, 24), "b": entry(0, 24)}, "does not begin where"),
    ({"a": entry(0, 8), "b": entry(16, 24)}, "b does not begin where"),
    ({"a": entry(4, 24)}, "a does not begin where"),
    ({"a": entry(0, 20)}, "it has"),
    ({"a": entry(0, 28)}, "it has"),
    ({}, "it has"),
    ({"a": entry(0, 24, [5])}, "a has 24 bytes, which is not its shape (5,) in F32"),
    ({"a": entry(0, 24, dtype="F16")}, "a has 24 bytes, which is not its shape (6,) in F16"),
    ({"a": entry(0, 24, [-2, -3])}, "no places and sizes"),
    ({"a": entry(0, 24, [2.0, 3.0])}, "no places and sizes"),
    ({"a": entry(0, 24, [True, 6])}, "no places and sizes"),
    ({"a": entry(0, 24, "6")}, "no places and sizes"),
    ({"a": entry(0, 24, None) | {"data_offsets": [0.0, 24.0]}}, "no places and sizes"),
    ({"a": entry(0, 24, None) | {"data_offsets": [0, 24, 24]}}, "is damaged"),
    ({"a": entry(0, 24) | {"data_offsets": None}}, "is damaged"),
    ({"z": entry(0, 0, [0]), "a": entry(24, 0, [6]), "b": entry(0, 24)}, "a has -24 bytes"),
    ({"a": entry(-24, 0), "b": entry(0, 24)}, "no places and sizes"),
    ({"a": {"dtype": "F32", "shape": [6]}}, "is damaged"),
    ({"a": {"shape": [6], "data_offsets": [0, 24]}}, "is damaged"),
    ({"a": 3}, "is damaged"),
    ({"a": entry(0, 24, dtype=[])}, "is damaged"),
    ([1, 2], "is damaged"),
    (b"{}" * 3, "is damaged"),
    (b"[" * 100_000, "is damaged"),
    (b'{"a": \xff}', "is damaged"),
    (b'{"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 1e999]}}', "no places and sizes"),
]


@pytest.mark.parametrize(("header", "message"), DAMAGED, ids=range(len(DAMAGED)))
def test_headers_that_do_not_add_up_are_refused(header, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(with_header(header))
    assert library_reads(path) is None
    with pytest.raises(UserError, match=re.escape(message)):
        TensorFile(path)


def test_a_name_given_twice_is_refused(tmp_path):
    one = json.dumps(entry(0, 24))
    (tmp_path / "file").write_bytes(with_header(f'{{"a": {one}, "a": {one}}}'.encode()))
    with pytest.raises(UserError, match="a stands twice in its header"):
        TensorFile(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 16, (10**15).to_bytes(8, "little") + b"{}"])
def test_what_has_no_header_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=r"file is damaged \(it has no header; .*Git LFS\?\): fetch or export it again"):
        TensorFile(tmp_path / "file")


def test_a_file_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(UserError, match="file is missing: fetch or export the folder again"):
        TensorFile(tmp_path / "file")


def test_a_file_that_shrinks_is_noticed_when_it_is_read(tmp_path):
    values = values_of(np.dtype(np.float32), {"a": (300,)})
    path = written(tmp_path / "file", values, np.dtype(np.float32))
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="became shorter while it was read"):
        file.read("a")


def test_empty_tensors_may_lie_anywhere_between_others(tmp_path):
    header = {"b": entry(0, 24), "a": entry(0, 0, [0, 3]), "c": entry(24, 24, [0])}
    (tmp_path / "file").write_bytes(with_header(header))
    file = TensorFile(tmp_path / "file")
    assert_equal({name: file.read(name) for name in header}, library_reads(tmp_path / "file"))
