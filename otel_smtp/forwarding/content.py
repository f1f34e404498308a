"""The content of one message, held until an upstream has taken it: in memory while it is small, in a file beyond.

It can be read once per upstream tried, also by several at once. The header block is held separately, as each delivery
adds its own trace headers. The file is written and read in threads, as both may wait for a disk; small messages need
none of that.
"""

import asyncio
import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import IO, Final, NamedTuple, TypeVar, TypeVarTuple, Unpack

from otel_smtp.forwarding.base import nobody_waits
from otel_smtp.forwarding.reencoding import CannotReencode, Reencoder, Survey
from otel_smtp.smtp import replies
from otel_smtp.smtp.content import needs_smtputf8
from otel_smtp.smtp.replies import Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.content")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

READ_OCTETS: Final = 256 * 1024
"""Octets read from the file at a time: a trip to a thread costs as much as copying this many."""


class Content:
    """A message that is being collected, then sent.

    Args:
        memory_limit_octets: for the body; the rest goes to an unnamed temporary file.
        resume: called once after a `write` that returned False, when more can be taken.
        header, body: of a whole, small enough message; then `write` must not be called.

    Attributes:
        header: the whole header block, unchanged; b"" before it arrives.
        pieces: the body, while it is in memory; None: it is in the file, see `read`.
        body_octets: octets behind the header block, including the empty line.
        failure: the reply to the client if the message could not be held; the rest is then taken and dropped.
        original: the content of which this is the re-encoded form; None: this is the client's.
    """

    __slots__ = (
        "_completed",
        "_file",
        "_has_8bit_in_file",
        "_held",
        "_is_closed",
        "_is_writing",
        "_memory_limit",
        "_most_octets",
        "_reencoded",
        "_resume",
        "_threads",
        "body_octets",
        "failure",
        "header",
        "original",
        "pieces",
    )

    # Of the file; set once there is one.
    _is_writing: bool  # a thread works on the file; nothing more comes before it is done
    _has_8bit_in_file: bool
    _completed: Callable[[], None] | None

    def __init__(
        self, memory_limit_octets: int, resume: Callable[[], None], header: bytes = b"", body: bytes = b""
    ) -> None:
        self.header = header
        self.body_octets = len(body)
        self.failure: Reply | None = None
        self._memory_limit = memory_limit_octets
        self._most_octets = memory_limit_octets  # of the body, before the rest goes to the file
        self._resume = resume
        self._held = [body] if body else []  # of the body, not in the file
        self.pieces: list[bytes] | None = self._held
        self._file: IO[bytes] | None = None
        self._threads = 0  # that use the file, or what is held
        self._is_closed = False
        self.original: Content | None = None
        self._reencoded: Content | Reply | None = None

    # Collecting -------------------------------------------------------------------------------------------

    def write(self, chunk: bytes) -> bool:
        """Hold another piece of the message, the header block first; returns whether more may come now."""
        if not self.header:
            self.header = chunk
            return True
        if self.failure is not None:
            return True
        self._held.append(chunk)
        octets = self.body_octets = self.body_octets + len(chunk)
        if octets > self._most_octets:
            self._spill()
        return self._file is None or not self._is_writing

    def complete(self, completed: Callable[[], None]) -> None:
        """The message is complete; calls `completed` when it can be read, or `failure` is set, perhaps at once."""
        if self._file is None:
            completed()
            return
        if not self._is_writing:
            if not self._held or self.failure is not None:
                completed()
                return
            self._spill()
        self._completed = completed

    def close(self) -> None:
        """Free memory and file, and make no further call; the file has no name and vanishes. Idempotent."""
        self._is_closed = True
        self._held.clear()
        if isinstance(self._reencoded, Content):
            self._reencoded.close()
        self._reencoded = self.original = None
        if self._file is not None:
            self._completed = None
            # If it were closed while a thread uses it, the thread might write into the next file with the same
            # descriptor.
            if not self._threads:
                self._file.close()

    @property
    def is_8bit(self) -> bool:
        """Whether any octet is above 127."""
        if self._file is not None and self._has_8bit_in_file:
            return True
        return not self.header.isascii() or not all(map(bytes.isascii, self._held))

    @property
    def needs_smtputf8(self) -> bool:
        """Whether a header of it may hold octets above 127; see there."""
        return self.is_8bit and needs_smtputf8(self.header)

    # Reading ----------------------------------------------------------------------------------------------

    def read(self, offset: int, answered: Callable[[bytes | None], None]) -> None:
        """Read a piece of the body from the file.

        Args:
            offset: where it begins, less than `body_octets`.
            answered: takes the piece, at least one octet; or None: the file cannot be read.
        """
        assert self._file is not None
        self._in_thread(partial(self._piece_read, answered), _read, self._file, offset)

    def _piece_read(
        self, answered: Callable[[bytes | None], None], piece: bytes | None, error: BaseException | None
    ) -> None:
        answered(piece or None)  # a premature end counts as an error

    def reencode(self, answered: "Callable[[Content | Reply], None]") -> None:
        """Re-encode 8-bit content as 7-bit: see `reencoding`. The message must be complete.

        Args:
            answered: takes the re-encoded content, which lives as long as this one, or the reason why there is none.
                Perhaps at once: the work is done only once, in a thread.
        """
        if self._reencoded is not None:
            answered(self._reencoded)
            return
        file = self._file if self.pieces is None else None
        pieces = tuple(self._held)
        ended = partial(self._reencoding_ended, answered)
        self._in_thread(ended, _reencode, self.header, pieces, file, self.body_octets)

    def _reencoding_ended(
        self, answered: "Callable[[Content | Reply], None]", made: "_Made | None", error: BaseException | None
    ) -> None:
        if made is not None:
            content = Content(self._memory_limit, nobody_waits, made.header)
            content.original = self
            content.body_octets, content._held = made.octets, made.pieces
            content.pieces = made.pieces if made.file is None else None
            if made.file is not None:
                content._begin_file(made.file)
            self._reencoded = content
        elif isinstance(error, CannotReencode):
            reply = replies.CANNOT_REENCODE
            self._reencoded = reply.with_text(f"{reply.text}: {error}")
        elif isinstance(error, OSError):
            answered(_storage_reply(error))
            return
        else:
            logger.error("re-encoding failed: internal error", exc_info=error)
            answered(replies.INTERNAL)
            return
        answered(self._reencoded)

    # ------------------------------------------------------------------------------------------------------

    def _spill(self) -> None:
        """Move the held octets to the file."""
        if self._file is not None and self._is_writing:
            return
        data, self._held = self._held, []
        self._most_octets = self.body_octets + self._memory_limit
        self.pieces = None
        if self._file is None:
            try:
                self._begin_file(tempfile.TemporaryFile(prefix="otel_smtp-", buffering=0))  # noqa: SIM115 - see close
            except OSError as error:
                self._fail(error)
                return
            assert self._file is not None
        self._has_8bit_in_file = self._has_8bit_in_file or not all(map(bytes.isascii, data))
        self._is_writing = True
        self._in_thread(self._spilled, _write_all, self._file, data)

    def _begin_file(self, file: IO[bytes]) -> None:
        self._file = file
        self._is_writing = self._has_8bit_in_file = False
        self._completed = None

    def _spilled(self, _: None, error: BaseException | None) -> None:
        self._is_writing = False
        if error is not None:
            self._fail(error)
        elif self.body_octets > self._most_octets or (self._held and self._completed is not None):
            self._spill()  # more had arrived meanwhile
            return
        completed, self._completed = self._completed, None
        if completed is not None:
            completed()
        else:
            self._resume()

    def _fail(self, error: BaseException) -> None:
        self._held.clear()
        self.failure = _storage_reply(error)

    def _in_thread(
        self,
        done: Callable[[T | None, BaseException | None], None],
        work: Callable[[Unpack[Ts]], T],
        *arguments: *Ts,
    ) -> None:
        self._threads += 1
        running = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        running.add_done_callback(partial(self._thread_ended, done))

    def _thread_ended(
        self, done: Callable[[T | None, BaseException | None], None], running: "asyncio.Future[T]"
    ) -> None:
        self._threads -= 1
        error = asyncio.CancelledError() if running.cancelled() else running.exception()
        if self._is_closed:
            if error is None and isinstance(made := running.result(), _Made) and made.file is not None:
                made.file.close()
            self.close()
        elif error is not None:
            done(None, error)
        else:
            done(running.result(), None)


def _storage_reply(error: BaseException) -> Reply:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return replies.STORAGE_FULL if is_full else replies.STORAGE_FAILED


class _Made(NamedTuple):
    """A re-encoded message; its body is in `pieces`, or in `file` if the original's was in one."""

    header: bytes
    octets: int
    pieces: list[bytes]
    file: IO[bytes] | None


def _reencode(header: bytes, pieces: Sequence[bytes], file: IO[bytes] | None, octets: int) -> _Made:
    """In a thread.

    Args:
        pieces: the body, unless it is in `file`.
        octets: of the body.

    Raises:
        CannotReencode: see there.
        OSError: the file cannot be read, or there is no room for another.
    """
    survey = Survey()
    survey.feed(header)
    for piece in pieces if file is None else _pieces_of(file, octets):
        survey.feed(piece)
    survey.finish()
    reencoder = Reencoder(survey)
    reencoder.feed(header)
    if file is None:
        made = [*map(reencoder.feed, pieces), reencoder.finish()]
        return _Made(reencoder.header, sum(map(len, made)), [piece for piece in made if piece], None)
    out = tempfile.TemporaryFile(prefix="otel_smtp-", buffering=0)  # noqa: SIM115 - see Content.close
    try:
        for piece in _pieces_of(file, octets):
            _write_all(out, [reencoder.feed(piece)])
        _write_all(out, [reencoder.finish()])
        return _Made(reencoder.header, out.tell(), [], out)
    except BaseException:
        out.close()
        raise


def _pieces_of(file: IO[bytes], octets: int) -> Iterator[bytes]:
    offset = 0
    while offset < octets:
        piece = _read(file, offset)
        if not piece:
            raise OSError(errno.EIO, "an end before the end")
        offset += len(piece)
        yield piece


def _write_all(file: IO[bytes], chunks: list[bytes]) -> None:
    rest = memoryview(b"".join(chunks))
    while rest:
        rest = rest[file.write(rest) :]


def _read(file: IO[bytes], offset: int) -> bytes:
    return os.pread(file.fileno(), READ_OCTETS, offset)
