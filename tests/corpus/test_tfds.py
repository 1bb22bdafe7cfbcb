"""Datasets that TFDS prepared as array_record are read without TensorFlow, whole, in parts and in slices."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from eurollm_jax.corpus.reading.sources import Defaults, Document, find_parts, part_files, read_documents, read_part
from eurollm_jax.errors import UserError

ROWS = 120


class Letters(tfds.core.GeneratorBasedBuilder):
    """A small corpus of several languages, one configuration each."""

    code_path = None  # it would be looked for in a package that this file is not in
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="fi"),
        tfds.core.BuilderConfig(name="20260601.ga"),
        tfds.core.BuilderConfig(name="mixed"),
    )

    def _info(self):
        features = {"text": tfds.features.Text(), "url": tfds.features.Text(), "stars": np.int32}
        features |= {"tags": tfds.features.Sequence(tfds.features.Text())}
        features |= {"language": tfds.features.Text()} if self.builder_config.name == "mixed" else {}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(ROWS), "fi": self._generate_examples(5)}

    def _generate_examples(self, count):
        for number in range(count):
            example = {"text": text(self.builder_config.name, number), "url": f"https://e.org/{number}"}
            example |= {"stars": number, "tags": ["a", str(number)]}
            example |= {"language": ("sv", "da")[number % 2]} if self.builder_config.name == "mixed" else {}
            yield number, example


def text(configuration, number):
    return f"Pitkä rivi {number} {configuration} " + "ä" * number


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for configuration in Letters.BUILDER_CONFIGS:
        config = tfds.download.DownloadConfig(num_shards=3)
        builder = Letters(config=configuration.name, data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_config=config)
    return folder


def test_documents_of_each_configuration(data_dir):
    found = list(read_documents(f"tfds:letters/fi:1.2.0?split=train&data_dir={data_dir}", licence="MIT"))
    assert [document.text for document in found] == [text("fi", number) for number in range(ROWS)]
    expected = Document(found[7].text, found[7].id, "fi", "letters", "MIT", "https://e.org/7")
    assert found[7] == Document(
        *[getattr(expected, name) for name in ("text", "id", "language", "source", "licence")],
        "https://e.org/7",
        "",
        {"stars": 7, "tags": ["a", "7"]},
    )
    assert {d.language for d in read_documents(f"tfds:letters/20260601.ga?split=train&data_dir={data_dir}")} == {"ga"}
    mixed = list(read_documents(f"tfds:letters/mixed?split=train&data_dir={data_dir}"))
    assert [document.language for document in mixed[:3]] == ["sv", "da", "sv"]


@pytest.mark.parametrize("split", ["train", "train[10:115]", "train[:50%]", "fi"])
@pytest.mark.parametrize("part_bytes", [1, 1 << 28])
def test_parts_are_ranges_of_examples_along_files(data_dir, split, part_bytes):
    """Held against TFDS' own data source."""
    builder = tfds.builder_from_directory(data_dir / "letters/fi/1.2.0")
    theirs = [example["text"].decode() for example in builder.as_data_source(split=split)]
    parts = find_parts([f"tfds:letters/fi:1.2.0?split={split}&data_dir={data_dir}"], part_bytes=part_bytes)
    assert len(parts) == (1 if part_bytes > 1 else len(builder.info.splits[split].file_instructions))
    assert [document.text for part in parts for document in read_part(part)] == theirs
    files = [part_files(part) for part in parts]
    assert all(len(names) == 1 for names in files) or len(parts) == 1
    assert {str(file) for names in files for file in names} == {
        str(instruction.filename) for instruction in builder.info.splits[split].file_instructions
    }


def test_the_newest_version_and_the_folder_of_the_environment_are_meant_when_left_out(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    (part,) = find_parts(["tfds:letters/fi?split=train"])
    assert part.input == f"tfds:letters/fi:1.2.0?split=train&data_dir={data_dir}"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tfds:letters/fi:1.2.0?data_dir={}", "names no split"),
        ("tfds:letters/fi:1.2.0?split=trian&data_dir={}", "has no split 'trian'; did you mean 'train'?"),
        ("tfds:letters/fi:1.2.0?splt=train&data_dir={}", "has an option 'splt'"),
        ("tfds:letters/fi:9.9.9?split=train&data_dir={}", "9.9.9 does not exist; there is 1.2.0"),
        ("tfds:leters/fi?split=train&data_dir={}", "leters does not exist; did you mean 'letters'?"),
        ("tfds:letters?split=train&data_dir={}", "add one of its configurations, 20260601.ga, fi, mixed"),
        ("tfds:?split=train&data_dir={}", "names no dataset"),
        ("tfds:../letters/fi?split=train&data_dir={}", "names no dataset"),
    ],
)
def test_addresses_that_name_nothing(data_dir, address, said):
    with pytest.raises(UserError) as error:
        find_parts([address.format(data_dir)])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_text_column_is_found_or_named(data_dir):
    (part,) = find_parts([f"tfds:letters/fi:1.2.0?split=fi&data_dir={data_dir}"])
    assert next(read_part(part, Defaults(fields={"text": "url"}))).text == "https://e.org/0"
    with pytest.raises(UserError, match="has no field 'txt'; did you mean 'text'"):
        next(read_part(part, Defaults(fields={"text": "txt"})))


def test_a_damaged_and_a_missing_file_are_named(tmp_path):
    builder = Letters(config="fi", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    address = f"tfds:letters/fi:1.2.0?split=train&data_dir={tmp_path}"
    parts = find_parts([address], part_bytes=1)
    (file,) = part_files(parts[1])
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert len(list(read_part(parts[0]))) == ROWS // 3
    with pytest.raises(UserError, match=r"examples \d+ to \d+ cannot be read"):
        list(read_part(parts[1]))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is missing, though"):
        find_parts([address])


def test_tensorflow_is_not_imported(data_dir):
    code = (
        "import sys; from eurollm_jax.corpus.reading.sources import read_documents; "
        f"count = len(list(read_documents('tfds:letters/fi?split=train&data_dir={data_dir}'))); "
        "print(count, 'tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == f"{ROWS} True False\n"
