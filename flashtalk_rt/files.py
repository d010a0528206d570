"""Paths that a user gave, checked before any work; `name` begins the text of an InputError."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

from .errors import InputError


def check_input(path: Path, name: str) -> None:
    """InputError unless `path` is a regular file that can be found."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        if re.match(r"\w{2,}:/", str(path)):
            raise InputError(
                f"{name} {path}: a URL is not read; download it first and give the file"
            ) from None
        raise InputError(f"{name} {path} does not exist; check the path") from None
    except OSError as error:
        raise InputError(f"{name} {path} cannot be read: {error.strerror}; check the path") from error
    if not stat.S_ISREG(kind):
        raise InputError(f"{name} {path} is not a file; give the path of one")


def check_output(path: Path, name: str) -> None:
    """InputError unless a regular file is or can be made at `path`; an existing one stays as it is."""
    try:
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            # Of a link that leads nowhere yet, the folder where its target would be.
            folder = (Path(os.path.realpath(path)) if path.is_symlink() else path).parent
            if not folder.is_dir():
                raise InputError(
                    f"{name} {path}: the folder {folder} does not exist; create it first"
                ) from None
            with tempfile.TemporaryFile(dir=folder):
                return
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a device or a pipe"
            raise InputError(f"{name} {path} is {what}; give the name of a file")
        with open(path, "r+b"):
            pass
    except OSError as error:
        raise InputError(f"{name} {path} cannot be written: {error.strerror}") from error
