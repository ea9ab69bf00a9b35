"""The work of `data.prepare`: pieces to tokens in order, with a journal to go on from.

While it runs there are beside the target:

- .PREFIX.bin.partial, .PREFIX.bin.sizes.partial: tokens and lengths so far;
- .PREFIX.journal: the settings, then about once a second what is safely on disk;
- PREFIX.bad_lines.txt: lines left out, as file:line: reason.

Pieces are written in the order of the input whatever order workers finish them in, so the result
does not depend on the number of workers, and a run that goes on from the journal ends with
the same bytes as one that was never stopped.
"""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from common.ending import starting_workers
from common.errors import DataError, Place
from common.files import writing
from common.jsonl import parse
from data.corpus.prepare_worker import Inherited, Inputs, Piece, Span, Worker
from data.corpus.readers import Reader
from data.corpus.token_store import StorePaths
from data.corpus.token_store_writer import TokenStoreWriter, WrittenSoFar, is_finished
from data.crashes import find_crash

AGAIN = "the same command, without --overwrite, goes on from where it stopped"
SHOWN = 5
SAVE_SECONDS = 1.0
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Progress:
    """How far the work is: a line of the journal.

    `line` counts the lines of source number `source` that lie in finished pieces.
    """

    pieces: int = 0
    tokens: int = 0
    documents: int = 0
    bad: int = 0
    empty: int = 0
    input_bytes: int = 0
    source: int = 0
    line: int = 0
    report_bytes: int = 0


class Journal:
    """The settings of a run and its progress, on disk.

    Raises (on entering):
        DataError: another process holds it, or it belongs to a run with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], begin: Progress) -> None:
        self._path = path
        self._settings = settings
        self._file: IO[bytes] | None = None
        self.progress = begin
        self.resumed = False

    def __enter__(self) -> "Journal":
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
            self._lock(self._file)
        try:
            self._read(self._file)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def _lock(self, file: IO[bytes]) -> None:
        try:
            # A record lock is not inherited by the workers, so it ends with this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise DataError(f"another data.prepare is writing here ({self._path})") from error

    def _read(self, file: IO[bytes]) -> None:
        file.seek(0)
        content = file.read()
        # A crash may leave half a line at the end.
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        if len(lines) <= 1:
            # Nothing has been finished, so there is nothing to go on from.
            file.truncate(0)
            self._append(self._settings)
            return
        try:
            settings, *_, last = map(_object, lines)
            self.progress = Progress(**last)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self._path} is damaged ({error}): start again with --overwrite"
            ) from error
        self._compare(settings)
        file.truncate(len(whole))
        self.resumed = True

    def _compare(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self._settings))
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed:
            details = "; ".join(
                f"{key} was {_short(before.get(key))}, is {_short(now.get(key))}" for key in changed
            )
            raise DataError(
                f"{self._path} is from an unfinished run with other settings ({details}): use the "
                "same settings to go on, or --overwrite to start again"
            )

    def advance(self, progress: Progress) -> None:
        """Record that everything up to here is on disk."""
        self._append(asdict(progress))
        self.progress = progress

    def _append(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        with writing(self._path, hint=AGAIN):
            self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())


def _object(line: bytes) -> dict[str, Any]:
    value = parse(line)
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is no object")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class BadLines:
    """The report of lines left out, PREFIX.bad_lines.txt; there is none before the first."""

    def __init__(self, path: Path, held: int) -> None:
        self.path, self._file = path, None if held == 0 else self._open(path, held)
        if self._file is None:
            path.unlink(missing_ok=True)  # of an earlier store

    def _open(self, path: Path, held: int) -> IO[bytes]:
        with writing(path):
            file = path.open("a+b")
            if file.seek(0, os.SEEK_END) < held:
                file.close()
                raise DataError(f"{path} was cut off or deleted: start again with --overwrite")
            file.truncate(held)
        return file

    def write(self, lines: Sequence[str]) -> int:
        """Append lines; returns the size of the report."""
        if self._file is None:
            if not lines:
                return 0
            self._file = self._open(self.path, 0)
        with writing(self.path, hint=AGAIN):
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            return self._file.tell()

    def flush(self) -> None:
        """Bring the report to the disk itself."""
        if self._file is not None:
            with writing(self.path, hint=AGAIN):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the report; one that a disk left no room for is deleted."""
        if self._file is not None:
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()


@dataclass(frozen=True)
class Job:
    """One run of `data.prepare`.

    Attributes:
        prefix: of the store.
        settings: everything the result depends on, for the journal.
        inputs, readers, pieces: what to read.
        begin: where the pieces begin.
        worker: encodes pieces.
        workers: processes.
        skip_bad: whether bad lines are left out (and reported) rather than an error.
    """

    prefix: Path
    settings: dict[str, Any]
    inputs: Inputs
    readers: dict[str, Reader]
    pieces: list[tuple[Span, ...]]
    begin: Progress
    worker: Worker
    workers: int
    skip_bad: bool

    def run(self, writer_options: dict[str, Any]) -> tuple[Progress, bool]:
        """Do it, or the rest of it. Returns the counts and whether it was resumed.

        Raises:
            DataError: a bad line that is not to be skipped, or a disk that is full.
        """
        journal_path = hidden(self.prefix, "journal")
        with Journal(journal_path, self.settings, self.begin) as journal:
            done = journal.progress
            if done.pieces == len(self.pieces) and is_finished(
                self.prefix, writer_options["layout"]
            ):
                journal_path.unlink()
                return done, True
            at = WrittenSoFar(done.tokens, done.documents) if journal.resumed else None
            writer = TokenStoreWriter(self.prefix, resume=at, hint=AGAIN, **writer_options)
            report = BadLines(StorePaths(self.prefix).bad_lines, done.report_bytes)
            try:
                self._pieces(journal, writer, report)
            except BaseException:
                with contextlib.suppress(DataError):
                    writer.close()
                raise
            finally:
                report.close()
            if not journal.progress.tokens:
                writer.abort()
                journal_path.unlink()
                raise DataError(_nothing(self.inputs, journal.progress))
            writer.finish()
            journal_path.unlink()
            return journal.progress, journal.resumed

    def _pieces(self, journal: Journal, writer: TokenStoreWriter, report: BadLines) -> None:
        progress = journal.progress
        pieces = self.pieces[progress.pieces :]
        results = self._results(pieces)
        saved = time.monotonic()
        with contextlib.closing(results), self._bar(progress) as bar:
            try:
                for spans, piece in zip(pieces, results, strict=True):
                    following, bad = self._locate(progress, spans, piece)
                    if bad and not self.skip_bad:
                        raise DataError(_bad_line_error(bad, self.prefix))
                    writer.add_documents(piece.ids, piece.sizes)
                    progress = replace(
                        following,
                        tokens=writer.written.tokens,
                        documents=writer.written.documents,
                        report_bytes=report.write(bad),
                    )
                    bar.update(piece.size)
                    bar.set_postfix(tokens=progress.tokens, bad_lines=progress.bad, refresh=False)
                    if time.monotonic() - saved >= SAVE_SECONDS:
                        _save(journal, progress, writer, report)
                        saved = time.monotonic()
            except BaseException:
                # The disk may be what has failed; then the journal stays as it is.
                with contextlib.suppress(DataError):
                    _save(journal, progress, writer, report)
                raise
        _save(journal, progress, writer, report)

    def _bar(self, progress: Progress) -> "tqdm[Any]":
        return tqdm(
            total=sum(span.stop - span.start for piece in self.pieces for span in piece),
            initial=progress.input_bytes,
            unit="B",
            unit_scale=True,
            desc="tokenizing",
            disable=None,
        )

    def _locate(
        self, before: Progress, spans: Sequence[Span], piece: Piece
    ) -> tuple[Progress, list[str]]:
        """Progress after `piece`, and its bad lines as "file:line: reason"."""
        source, line = before.source, before.line
        first_lines = []
        for span, count in zip(spans, piece.lines, strict=True):
            if span.source != source:
                source, line = span.source, 0
            first_lines.append(line)
            line += count
        bad = [
            f"{self.inputs.sources[spans[number].source].path}:{first_lines[number] + at}: {reason}"
            for number, at, reason in piece.bad
        ]
        progress = replace(
            before,
            pieces=before.pieces + 1,
            bad=before.bad + len(bad),
            empty=before.empty + piece.empty,
            input_bytes=before.input_bytes + piece.size,
            source=source,
            line=line,
        )
        return progress, bad

    def _results(self, pieces: Sequence[tuple[Span, ...]]) -> Generator[Piece, None, None]:
        """Encoded pieces in order; at most two a worker are held at once."""
        if self.workers == 1 or len(pieces) <= 1:
            yield from map(self.worker.work, pieces)
            return
        Inherited.worker = self.worker
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(
            min(self.workers, len(pieces)),
            mp_context=context,
            initializer=Inherited.start,
            initargs=(os.getpid(),),
        )
        waiting: deque[Future[Piece]] = deque()
        done = 0
        try:
            for spans in pieces:
                with starting_workers():
                    waiting.append(pool.submit(Inherited.work, spans))
                if len(waiting) > 2 * self.workers:
                    yield waiting[0].result()
                    waiting.popleft()
                    done += 1
            while waiting:
                yield waiting[0].result()
                waiting.popleft()
                done += 1
        except BrokenProcessPool as error:
            self._refuse_what_crashes(pieces[done : done + len(waiting) + 1])
            raise DataError(
                "a worker was killed, most likely for want of memory: use fewer --workers; " + AGAIN
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            Inherited.worker = None

    def _refuse_what_crashes(self, pieces: Sequence[tuple[Span, ...]]) -> None:
        """`DataError` that names the document at which a worker dies, if it is one of these."""
        spans = [part for piece in pieces for span in piece for part in self._documents(span)]
        crash = find_crash(self.worker.work, [(span,) for span in spans], "fork")
        if crash is None:
            return
        span = spans[crash.number]
        path = Path(self.inputs.sources[span.source].path)
        with path.open("rb") as file:
            before, document = file.read(span.start), file.read(span.stop - span.start)
        blank = document[: len(document) - len(document.lstrip())]
        line = before.count(b"\n") + blank.count(b"\n") + 1
        raise DataError(
            f"the tokenizer ended its process ({crash.how}) at this document: leave it out or "
            "change it, and start again with --overwrite",
            Place(path, line),
        )

    def _documents(self, span: Span) -> Iterator[Span]:
        """The smallest pieces of a span."""
        source = self.inputs.sources[span.source]
        reader, start = self.readers[source.format], span.start
        with Path(source.path).open("rb") as file:
            while start < span.stop:
                stop = min(reader.next_start(file, start + 1), span.stop)
                yield replace(span, start=start, stop=stop)
                start = stop


def _save(journal: Journal, progress: Progress, writer: TokenStoreWriter, report: BadLines) -> None:
    """Make sure that a later run can go on from here."""
    if progress != journal.progress:
        writer.flush()
        report.flush()
        journal.advance(progress)


def start_of(inputs: Inputs, piece: Sequence[Span]) -> Progress:
    """Where the work stands before a piece in the middle of the input: its file and its line."""
    span = piece[0]
    line, left = 0, span.start
    with Path(inputs.sources[span.source].path).open("rb") as file:
        while block := file.read(min(left, _BLOCK)):
            line += block.count(b"\n")
            left -= len(block)
    return Progress(source=span.source, line=line)


def hidden(prefix: Path, suffix: str) -> Path:
    """A working file beside the store."""
    return prefix.with_name(f".{prefix.name}.{suffix}")


def _bad_line_error(bad: Sequence[str], prefix: Path) -> str:
    more = f"\n  and {len(bad) - SHOWN} more in this part of the input" if len(bad) > SHOWN else ""
    listed = "\n  ".join(bad[:SHOWN])
    return (
        f"bad input, nothing was dropped:\n  {listed}{more}\nput it right, or leave such lines "
        f"out with --on_bad_line skip, which lists them in {StorePaths(prefix).bad_lines}"
    )


def _nothing(inputs: Inputs, progress: Progress) -> str:
    return (
        f"the input gave no tokens: {len(inputs.sources)} file(s), {inputs.total_bytes} bytes, "
        f"{progress.bad} bad lines, {progress.empty} blank documents"
    )
