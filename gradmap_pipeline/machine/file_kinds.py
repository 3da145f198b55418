"""What stands where a file should be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def describe_other(path: Path) -> str | None:
    """What a path is, links followed; None where it is a file, or where nothing is. Nothing is opened."""
    try:
        return _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except FileNotFoundError:
        return f"a link to {os.readlink(path)!r}, where nothing is" if path.is_symlink() else None
    except (OSError, ValueError):
        return None
