"""A model as one text: `owner/name` of a hub, a path, or `builtin:docs-llama`."""

from __future__ import annotations

import os
import re

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PATH_STARTS = ("./", "../", "/", "~")
_BUILTIN = "builtin:"
ACCEPTED = "owner/name of a hub, a path that starts with './', '/' or '~', builtin:docs-llama, or a mapping"


def read_short_form(text: str) -> dict[str, str]:
    """`path`, `id` or `builtin`, as the mapping that the text stands for has it. Raises `ValueError` where that is not plain."""
    if text.startswith(_BUILTIN):
        return {"builtin": text.removeprefix(_BUILTIN)}
    if text.startswith(_PATH_STARTS) or text in (".", ".."):
        return {"path": os.path.expanduser(text)}
    if HUB_NAME.fullmatch(text):
        if os.path.lexists(text):
            raise ValueError(explain_ambiguous(text, "in the current folder", f"./{text}"))
        return {"id": text}
    raise ValueError(f"found {text[:100]!r}, accepted: {ACCEPTED}{_advise(text)}")


def explain_ambiguous(text: str, where: str, path: str) -> str:
    """That a name may be that of a model on the hub, and is that of a folder, too. `path`: of the folder, in its short form."""
    return f"found {text!r}, which is a folder {where}, and may be a model on the hub; write {path!r} or {{id: {text}}}"


def _advise(text: str) -> str:
    if text == "docs-llama":
        return f"; write {_BUILTIN}{text}"
    try:
        if text and os.path.lexists(text):
            return f"; write './{text}'"
    except ValueError:  # a null character
        return ""
    return f"; write {{id: {text}}}" if re.fullmatch(r"[\w.-]+", text, re.ASCII) else ""
