"""A remote file as a seekable one, for libraries that read parts of files: in blocks, retried and compared with the listing."""

from __future__ import annotations

import io
from typing import Any

from dinoray.errors import DinorayError
from dinoray.io.items import FileRef
from dinoray.io.volume_objects import read_part

_BLOCK_BYTES = 2**20


class RangedFile(io.RawIOBase):
    """A remote file as h5py wants it: seekable, read in blocks of 1 MiB of which the last few are kept.

    `failure` is the last typed error of a read: h5py may turn an exception into its own.
    """

    _KEPT = 16

    def __init__(self, ref: FileRef):
        super().__init__()
        self._ref, self._at = ref, 0
        self._blocks: dict[int, bytes] = {}
        self.failure: DinorayError | None = None

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            begin = number * _BLOCK_BYTES
            data = read_part(self._ref, begin, min(self._ref.size, begin + _BLOCK_BYTES))
            while len(self._blocks) >= self._KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[number] = data
        return self._blocks[number]

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; the number of bytes, 0 at the end."""
        view = memoryview(buffer).cast("B")
        done = 0
        try:
            while done < len(view) and self._at < self._ref.size:
                number, inside = divmod(self._at, _BLOCK_BYTES)
                part = self._block(number)[inside:inside + len(view) - done]
                view[done:done + len(part)] = part
                done += len(part)
                self._at += len(part)
        except DinorayError as error:
            self.failure = error
            raise
        return done

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; the new position."""
        self._at = offset + (0, self._at, self._ref.size)[whence]
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True
