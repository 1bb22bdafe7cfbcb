"""Our store as the last step of a datatrove pipeline, behind its readers, filters, de-duplication and executors.

Needs the extra `datatrove`. Each rank's documents become a unit of the same work folder that `prepare` uses; when all
ranks have ended, `finalize(out)` (or `eurollm corpus finalize`) makes the store.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document as TroveDocument
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from eurollm_jax.corpus.folders import discard_folder, full_disk_is_named
from eurollm_jax.corpus.preparing.unit import STAYS, Refusals, write_unit
from eurollm_jax.corpus.preparing.work_plan import PrepareOptions, WorkPlan, work_folder
from eurollm_jax.corpus.reading.documents import Document, Origin, document
from eurollm_jax.corpus.tokenizing.tokenizer import Tokenizer
from eurollm_jax.errors import UserError


class TokenStoreWriter(PipelineStep):
    """Writes the documents of each rank as a unit of the store `out`; nothing comes out of this step.

    Language, source, licence, url and date are taken from a document's metadata under the names that
    `sources.read_part` knows, else from `options`. A rank that runs again replaces its unit. Raises UserError when
    another pipeline, of other options, tokenizer or number of tasks, has begun to write `out`.
    """

    type = "💽 - WRITER"
    name = "EuroLLM token store"

    def __init__(self, out: str | Path, tokenizer: str | Path, options: PrepareOptions | None = None) -> None:
        super().__init__()
        self.out, self.tokenizer, self.options = Path(out), Path(tokenizer), options or PrepareOptions()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if (self.out / "manifest.json").exists():
            raise UserError(f"{self.out} is there already; choose another folder or delete it")
        tokenizer = Tokenizer.load(self.tokenizer)
        tokenizer.require_lossless()
        plan = WorkPlan(
            folder=work_folder(self.out),
            tokenizer={"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
            options=self.options.identity(),
            units=[()] * world_size,
            command="the datatrove pipeline",
        )
        with full_disk_is_named(plan.folder, STAYS):
            plan.settle()
        discard_folder(plan.unit_folder(rank))

        def reading(refusals: Refusals) -> Iterator[tuple[Document, str]]:
            for found in data or ():
                self.stat_update("documents")
                where = str(found.metadata.get("file_path") or f"rank {rank}")
                try:
                    ours = self._document(found, where)
                except UserError as error:
                    refusals.add(where, error)
                else:
                    yield ours, where

        with self.track_time():
            record = write_unit(plan, rank, reading, tokenizer, self.options, files={}, threads=1, tick=lambda _: None)
        self.stat_update("bytes", value=record["bytes"], unit="rank")
        yield from ()

    def _document(self, found: TroveDocument, where: str) -> Document:
        record: dict[str, Any] = {"text": found.text, "id": found.id, "metadata": found.metadata}
        origin = Origin(self.options.defaults, self.options.source or "datatrove")
        return document(record, lambda: f"{where}, document {found.id}", origin)
