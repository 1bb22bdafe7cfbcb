"""datamix.txt means here what it means to Megatron: the same datasets, in the same shares of the tokens."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eurollm_jax.corpus.megatron import export_megatron
from eurollm_jax.data.datamix import datamix, import_datamix, read_datamix, write_datamix
from eurollm_jax.data.loader import DataConfig, open_data
from eurollm_jax.data.mixture import Mixture, SourceSize
from eurollm_jax.errors import UserError

LENGTH = 32


@pytest.fixture(scope="module")
def blend(store, tmp_path_factory):
    """The small store's sources as Megatron datasets, and the folder of a datamix.txt that blends four of them."""
    folder = tmp_path_factory.mktemp("blend")
    for name, source in store.sources.items():
        export_megatron(source, folder / "letters" / "megatron-lm" / f"{name}_text_document")
    ratios = {"de": 30, "el": 10, "mt": 1.5, "bg": 0.02}
    lines = [f"{ratio} {folder}/letters/megatron-lm/{name}_text_document\n" for name, ratio in ratios.items()]
    (folder / "datamix.txt").write_text("".join(lines))
    return folder, {f"{name}/letters": ratio / 41.52 for name, ratio in ratios.items()}


def write(tmp_path, text):
    path = tmp_path / "datamix.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "0.25 /x/fi\n0.75 /x/sv\n",
        "0.25 /x/fi 0.75 /x/sv",
        "\n\t0.25\t/x/fi\r\n\r\n0.75   /x/sv  ",
        "# Finnish\n0.25 /x/fi # a third\n#0.5 /x/et\n\n0.75 /x/sv",
        "0.25\n/x/fi\n0.75\n/x/sv",
        "\ufeff1 /x/fi\n3e0 /x/sv",
    ],
)
def test_every_way_to_write_a_blend_is_the_same_blend(tmp_path, text):
    path = write(tmp_path, text)
    assert datamix(path) == Mixture.shares({"fi/x": 0.25, "sv/x": 0.75}, over="source")
    without_comments = re.sub(r"(?m)(^|\s)#.*$", " ", text.removeprefix("\ufeff")).split()  # Megatron splits, no more
    pairs = list(zip(without_comments[::2], without_comments[1::2], strict=True))
    assert [(part.ratio, part.path) for part in read_datamix(path)] == [(float(r), p) for r, p in pairs]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no dataset"),
        ("# 1 /x/fi\n", "names no dataset"),
        ("1 /x/fi\n/x/sv\n", r"datamix\.txt, line 2: '/x/sv' is where a ratio is due"),
        ("/x/fi\n/x/sv\n", r"line 1: '/x/fi' is where a ratio is due"),
        ("1 /x/fi\n\n2\n", r"line 3: the ratio 2 has no path after it"),
        ("1 2 /x/fi /x/sv", r"line 1: the ratio 1 has no path after it"),
        ("1 /x/fi\n0 /x/sv\n", r"line 2: the ratio 0 is not above 0"),
        ("1 /x/fi\n-1 /x/sv\n", r"line 2: the ratio -1 is not above 0"),
        ("nan /x/fi\n", r"line 1: the ratio nan is not above 0"),
        ("inf /x/fi\n", r"line 1: the ratio inf is not above 0"),
        ("1 /x/fi\n1 /x/sv\n2 /x/fi\n", r"line 3: /x/fi stands in line 1 already"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_datamix(write(tmp_path, text))


def test_a_file_that_is_no_datamix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*datamix\.txt"):
        datamix(tmp_path / "datamix.txt")
    (tmp_path / "datamix.txt").write_bytes(b"1 /x/\xff")
    with pytest.raises(UserError, match="is not UTF-8"):
        datamix(tmp_path / "datamix.txt")
    with pytest.raises(UserError, match="1 names are given for 2 datasets"):
        datamix(write(tmp_path, "1 /x/fi 2 /x/sv"), names=["fi"])
    assert datamix(write(tmp_path, "1 /x/q 1 /x/r"), languages=["fin_Latn", "sv"]) == Mixture.shares(
        {"fi/x-q": 0.5, "sv/x-r": 0.5}, over="source"
    )


def test_a_blend_is_read_in_its_ratios(blend, tokenizer, tmp_path):
    folder, shares = blend
    store, mixture = import_datamix(folder / "datamix.txt", tokenizer, tmp_path / "store", processes=1)
    assert mixture == datamix(folder / "datamix.txt")
    assert sorted(store.sources) == sorted(shares)

    rows = 20_000
    data = open_data(DataConfig(str(store.path), mixture, LENGTH), rows)
    tokens = dict.fromkeys(shares, 0)
    for first in range(0, rows, 1000):
        batch = data.batch(first, 1000)
        filled = (batch.segments > 0).sum(axis=1)
        for index, name in enumerate(data.source_names):
            tokens[name] += int(filled[batch.source == index].sum())
    total = sum(tokens.values())
    for name, share in shares.items():
        assert tokens[name] / total == pytest.approx(share, abs=2 * LENGTH * 1.68 / total), name


def test_a_blend_comes_back_from_a_compiled_mixture(blend, tokenizer, tmp_path):
    folder, shares = blend
    store, mixture = import_datamix(folder / "datamix.txt", tokenizer, tmp_path / "store", processes=1)
    data = open_data(DataConfig(str(store.path), mixture, LENGTH), 1000)
    prefixes = {
        f"{name}/letters": folder / "letters" / "megatron-lm" / f"{name}_text_document"
        for name in ["de", "el", "mt", "bg"]
    }
    write_datamix(tmp_path / "again.txt", data.schedule, data.sizes, prefixes)
    parts = read_datamix(tmp_path / "again.txt")
    assert [part.path.split("/")[-1][:2] for part in parts] == ["de", "el", "mt", "bg"]
    assert [part.ratio for part in parts] == pytest.approx(sorted(shares.values(), reverse=True), rel=1e-5)
    again = datamix(tmp_path / "again.txt").compile(data.sizes, 1000)
    np.testing.assert_allclose(again.stages[0].shares, data.schedule.stages[0].shares, atol=1)


@given(
    sources=st.lists(st.tuples(st.integers(1, 10**12), st.floats(1e-5, 1e5)), min_size=1, max_size=20),
    length=st.integers(1, 5000),
)
@settings(max_examples=100, deadline=None)
def test_any_mixture_survives_the_file(tmp_path_factory, sources, length):
    path = tmp_path_factory.mktemp("datamix") / "datamix.txt"
    names = [f"fi/x-{number:02}" for number in range(len(sources))]
    sizes = {n: SourceSize(t + 1, t, -(-t // length), "fi") for n, (t, _) in zip(names, sources, strict=True)}
    total = sum(ratio for _, ratio in sources)
    mixture = Mixture.shares({n: r / total for n, (_, r) in zip(names, sources, strict=True)}, over="source")
    try:
        schedule = mixture.compile(sizes, 10**6)
    except UserError:  # a share too small to be kept
        return
    write_datamix(path, schedule, sizes, {name: f"/x/{name}" for name in names})
    parts = read_datamix(path)
    again = datamix(path, names=[part.path.removeprefix("/x/") for part in parts]).compile(sizes, 10**6)
    np.testing.assert_allclose(again.stages[0].shares, schedule.stages[0].shares, atol=2)


def test_what_no_datamix_can_say_is_refused(tmp_path):
    sizes = {"fi": SourceSize(100, 100, 10, "fi"), "sv": SourceSize(100, 100, 10, "sv")}
    both = Mixture.shares({"fi": 0.5, "sv": 0.5})
    staged = both.stage(at_row=10, mixture=Mixture.shares({"fi": 1.0})).compile(sizes, 100)
    one = both.compile(sizes, 100)
    for schedule, prefixes, message in [
        (staged, {"fi": "/fi", "sv": "/sv"}, "changes in the course of the run, and a datamix.txt holds one"),
        (one, {"fi": "/fi"}, "'sv' has no dataset"),
        (one, {"fi": "/fi", "sv": "/s v"}, "'/s v' holds white space"),
    ]:
        with pytest.raises(UserError, match=message):
            write_datamix(tmp_path / "datamix.txt", schedule, sizes, prefixes)
        assert not (tmp_path / "datamix.txt").exists()
    only = Mixture.shares({"fi": 1.0}).compile(sizes, 100)
    write_datamix(tmp_path / "datamix.txt", only, sizes, {"fi": "/fi"})
    assert (tmp_path / "datamix.txt").read_text() == "1 /fi\n"


def widen(prefix, code, dtype):
    """Rewrite a dataset of uint16 with another type."""
    tokens = np.fromfile(f"{prefix}.bin", "<u2").astype(dtype)
    tokens.tofile(f"{prefix}.bin")
    index = Path(f"{prefix}.idx")
    content = bytearray(index.read_bytes())
    sequences = int.from_bytes(content[18:26], "little")
    content[17] = code
    pointers = slice(34 + 4 * sequences, 34 + 12 * sequences)
    content[pointers] = (np.frombuffer(content[pointers], "<i8") // 2 * np.dtype(dtype).itemsize).tobytes()
    index.write_bytes(content)


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_batches_are_the_same_whatever_type_the_tokens_have(store, tokenizer, tmp_path, packing):
    batches = []
    for number, types in enumerate([{}, {"de": (4, "<i4"), "mt": (5, "<i8")}]):
        folder = tmp_path / f"{number}" / "all"
        for name in ("de", "mt", "el"):
            export_megatron(store.sources[name], folder / name)
            if name in types:
                widen(folder / name, *types[name])
        blend = write(folder, "".join(f"1 {folder}/{name}\n" for name in ("de", "mt", "el")))
        imported, mixture = import_datamix(blend, tokenizer, folder / "store", processes=1)
        assert {source.dtype for source in imported.sources.values()} == {
            np.dtype(name) for name in ["<u2", *(name for _, name in types.values())]
        }
        data = open_data(DataConfig(str(imported.path), mixture, LENGTH, packing=packing), 500)
        batches.append(data.batch(0, 500))
    for one, other in zip(*batches, strict=True):
        np.testing.assert_array_equal(one, other)
