"""A block-list names documents by hash or address, and finds exactly those in a store."""

import hashlib

import pytest

from eurollm_jax.corpus.blocklist import Blocklist
from eurollm_jax.corpus.folders import file_sha256
from eurollm_jax.errors import UserError


def test_entries_are_hashes_and_urls_and_comments_are_not(tmp_path):
    digest = hashlib.sha256(b"a text")
    file = tmp_path / "block.txt"
    file.write_text(f"# asked for in May\n\n{digest.hexdigest().upper()}  # a letter\nhttps://example.org/a#b\n")
    blocklist = Blocklist.load(file)
    assert blocklist.blocks(digest.digest(), "")
    assert blocklist.blocks(b"\0" * 32, "https://example.org/a#b")
    assert not blocklist.blocks(b"\0" * 32, "https://example.org/a")
    assert not blocklist.blocks(b"\0" * 32, "")
    assert blocklist.sha256 == file_sha256(file)


@pytest.mark.parametrize("line", ["abc", "0" * 63, "0" * 63 + "g", "https://a b", "example.org/page"])
def test_a_line_that_is_neither_is_named(tmp_path, line):
    file = tmp_path / "block.txt"
    file.write_text(f"https://example.org\n{line}\n")
    with pytest.raises(UserError, match=r"block\.txt, line 2: .* is neither a SHA-256 .* nor a URL; mend or remove"):
        Blocklist.load(file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no block-list at"):
        Blocklist.load(tmp_path / "none.txt")


@pytest.mark.parametrize("kind", ["hashes", "urls", "both"])
def test_find_agrees_with_looking_at_every_document(store, tmp_path, kind):
    lines = []
    for source in store.sources.values():
        for index in range(0, source.documents, 7):
            document = source.document(index)
            lines += [document.sha256] if kind != "urls" else []
            lines += [document.url] if kind != "hashes" and document.url else []
    (tmp_path / "block.txt").write_text("\n".join([*lines, "0" * 64, "https://example.org/nothing"]))
    blocklist = Blocklist.load(tmp_path / "block.txt")
    for source in store.sources.values():
        documents = [source.document(index) for index in range(source.documents)]
        expected = [
            index
            for index, document in enumerate(documents)
            if blocklist.blocks(bytes.fromhex(document.sha256), document.url)
        ]
        assert len(expected) > 5
        assert blocklist.find(source).tolist() == expected
