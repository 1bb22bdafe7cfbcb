"""The last step of a datatrove pipeline: what its readers and filters let through is our store."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import ParquetReader

from eurollm_jax.corpus.preparing.datatrove_writer import TokenStoreWriter
from eurollm_jax.corpus.preparing.finalize import finalize
from eurollm_jax.corpus.preparing.work_plan import PrepareOptions
from eurollm_jax.errors import UserError


def is_even(document):
    return int(document.id.split("-")[1]) % 2 == 0


def pipeline(inputs, tokenizer, out, logs, tasks):
    steps = [
        ParquetReader(str(inputs), default_metadata={"date": "2024-05-01"}),
        LambdaFilter(is_even),
        TokenStoreWriter(out, tokenizer.model_path, PrepareOptions(deduplicate=True)),
    ]
    return LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(logs), skip_completed=True)


@pytest.mark.filterwarnings("ignore")  # of datatrove's own
def test_two_tasks_write_what_the_filter_lets_through(corpus_dir, tokenizer, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for file in corpus_dir.iterdir():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        pq.write_table(pa.Table.from_pylist([{"url": None} | row for row in rows]), inputs / f"{file.stem}.parquet")
    pipeline(inputs, tokenizer, out, tmp_path / "logs", 2).run()
    pipeline(inputs, tokenizer, out, tmp_path / "again", 2).run()  # a rank that runs again replaces its unit
    with pytest.raises(UserError, match="unfinished work on other data"):
        pipeline(inputs, tokenizer, out, tmp_path / "other", 3).run()
    store = finalize(out)
    store.verify()
    assert sorted(store.sources) == ["bg", "de", "el", "en", "mt"]
    for language, source in store.sources.items():
        lines = (corpus_dir / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
        expected = [record for record in map(json.loads, lines) if int(record["id"].split("-")[1]) % 2 == 0]
        assert source.documents == len(expected)
        for index, record in enumerate(expected):
            document = source.document(index)
            assert tokenizer.decode(source.document_tokens(index)) == record["text"]
            assert (document.id, document.url) == (record["id"], record.get("url", ""))
            assert (document.origin, document.licence) == (record["source"], record["licence"])
            assert document.collected == "2024-05-01"
