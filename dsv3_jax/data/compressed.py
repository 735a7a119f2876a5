"""Files read through their compression, `.gz` and `.zst`."""

import gzip
import io
import zlib
from typing import BinaryIO

SUFFIXES = (".gz", ".zst")
ERRORS = (OSError, EOFError, zlib.error)  # what reading a damaged file raises
# Compressed bytes decoded at once: 4 bytes can stand for 128 KB, so they become 64 MB at most.
_ZSTD_CHUNK = 2048


def open_binary(path: str) -> BinaryIO:
  """The contents of a file, decompressed where its suffix says so."""
  if path.endswith(".gz"):
    return gzip.open(path, "rb")
  if path.endswith(".zst"):
    return io.BufferedReader(_Zstd(path))
  return open(path, "rb")


class _Zstd(io.RawIOBase):
  """Frame after frame of a Zstandard file.

  The package's own reader ends at the first frame, and takes a file that was cut short for a whole
  one.
  """

  def __init__(self, path: str):
    import zstandard

    self._library = zstandard
    self._file = open(path, "rb")
    self._frame = None  # the frame being decoded
    self._ready = memoryview(b"")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._ready:
      data = self._file.read(_ZSTD_CHUNK)
      if not data:
        if self._frame is not None:
          raise EOFError("the compressed file ends within a frame; it was cut short")
        return 0
      self._ready = memoryview(self._decode(data))
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size

  def _decode(self, data: bytes) -> bytes:
    parts = []
    try:
      while data:
        if self._frame is None:
          self._frame = self._library.ZstdDecompressor().decompressobj()
        parts.append(self._frame.decompress(data))
        if not self._frame.eof:
          break
        data, self._frame = self._frame.unused_data, None
    except self._library.ZstdError as error:
      raise OSError(f"the compressed data are damaged: {error}") from None
    return b"".join(parts)

  def close(self) -> None:
    self._file.close()
    super().close()
