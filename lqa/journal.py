"""An append-only journal of finished work: one JSON line per piece, on disk before its result is used.

A killed process finds again everything that was added; the line it was killed in, and nothing else, is dropped.  On a full disk the
journal gives up a reserve that it holds, so that the pieces under way can still be written.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from lqa.errors import LqaError

RESERVE = 64 * 1024  # bytes for each piece that may be under way; a reply of 8,000 tokens needs half of it


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all.  Raises LqaError when it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise LqaError(f"{path} cannot be written ({error.strerror}); {_remedy(error)}.") from error


def _remedy(error: OSError) -> str:
    return "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder and its rights"


class Journal:
    """The records of `path`, by key; a context manager that keeps other processes out.

    `settings` (a flat dict) stand in the first line; records made under other settings are refused with LqaError, which names the first
    that differs.  `width` is how many pieces may be under way at once.
    """

    def __init__(self, path: Path, settings: dict, *, width: int = 1):
        self.path, self.settings, self.width = path, settings, width
        self.records: dict[str, dict] = {}
        self._file = None
        self._reserve = path.with_name(path.name + ".reserve")

    def __enter__(self) -> Journal:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path.with_name(self.path.name + ".lock"))
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise LqaError(f"Another process writes to {self.path.parent}; wait for it, or name another folder with --out.") from error
        except OSError as error:
            raise LqaError(f"{self.path.parent} cannot be written ({error.strerror}); {_remedy(error)}.") from error
        try:
            self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._reserve.unlink(missing_ok=True)
        self._lock.release()

    def _open(self) -> None:
        data = self.path.read_bytes() if self.path.is_file() else b""
        whole = data.rfind(b"\n") + 1  # what follows is the line that a kill cut short
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self._compare(entry["settings"])
                else:
                    self.records[entry["key"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                if isinstance(error, LqaError):
                    raise
                raise LqaError(f"{self.path}, line {number}: not a line of a journal; repair or delete that line.") from error
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if whole < len(data):
                os.ftruncate(self._file, whole)
            self._size = whole
            with open(self._reserve, "wb") as file:
                file.write(b"\0" * RESERVE * self.width)  # written, not sparse: it must hold the space
                file.flush()
                os.fsync(file.fileno())
            if not whole:
                self._append({"settings": self.settings})
        except OSError as error:
            raise LqaError(f"{self.path.parent} cannot be written ({error.strerror}); {_remedy(error)}.") from error

    def _compare(self, found: dict) -> None:
        for name in sorted(set(found) | set(self.settings)):
            if found.get(name) != self.settings.get(name):
                raise LqaError(
                    f"{self.path.parent} was begun with {name} {found.get(name)!r}, not {self.settings.get(name)!r}; "
                    "go on with the same, or name another folder with --out."
                )

    def _append(self, entry: dict) -> None:
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)  # half a line would swallow the next one
            raise
        self._size += len(line)

    def add(self, record: dict) -> None:
        """Appends a record, which has a "key", and returns when it is on disk.

        Raises LqaError when the disk is full; the record is then written from the reserve, if that suffices.
        """
        try:
            try:
                self._append(record)
            except OSError as error:
                if not self._reserve.exists():
                    raise
                self._reserve.unlink()
                self._append(record)
                self.records[record["key"]] = record
                raise LqaError(f"{self.path} cannot be written ({error.strerror}); {_remedy(error)}.") from error
        except OSError as error:
            raise LqaError(f"{self.path} cannot be written ({error.strerror}); {_remedy(error)}.") from error
        self.records[record["key"]] = record

    def remove(self) -> None:
        """Deletes the journal, once what it was kept for is written elsewhere."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)
