"""Files that are there completely or not at all."""

import os
from pathlib import Path


def write_file(file, content):
    """Write a file, all or nothing: an interrupted or failed write leaves it as it was.

    A link is replaced, for in a cache of the Hub it leads to what other versions share.

    Args:
        file: a `Path`, in a folder that exists.
        content: bytes, or text, which is written in UTF-8.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(_bytes(content))
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path, content):
    """Write to where somebody said: as `write_file`, but through links, and right into a pipe or a device, which stays one."""
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(_bytes(content))
    else:
        write_file(path.resolve(), content)


def _bytes(content):
    return content.encode() if isinstance(content, str) else content
