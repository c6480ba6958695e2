"""Files that are there completely or not at all."""

import os


def write_file(file, content):
    """Write a file, all or nothing: an interrupted or failed write leaves it as it was.

    Args:
        file: a `Path`, in a folder that exists.
        content: bytes, or text, which is written in UTF-8.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
