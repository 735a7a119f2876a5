"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes) -> Path:
  """Writes `content` (text as UTF-8) so that a reader, or a crash, sees the old file or the new.

  Raises:
    OSError: the folder does not exist or cannot be written to.
  """
  path = Path(path)
  data = content.encode("utf-8") if isinstance(content, str) else content
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
  try:
    with os.fdopen(descriptor, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600; other users read reports
    os.replace(temporary, path)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise
  return path
