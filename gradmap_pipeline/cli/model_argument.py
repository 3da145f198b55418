"""The model that a command names on its line instead of in a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph


def open_named(source: dict[str, Any]) -> ModelGraph:
    """The model that `model` of a recipe would mean, downloaded if it must be; only headers of its weights are read.

    Raises `CommandError` where the value is none that a recipe takes, `ModelError` where there is no such model.
    """
    from ..checkpoint.graph import open_folder
    from ..checkpoint.source import ModelSource
    from ..errors import CommandError
    from ..recipe.validation import Invalid, validate

    try:
        given = validate(ModelSource, source)
    except Invalid as invalid:
        raise CommandError(f"MODEL: {invalid.complaints[0][1]}") from invalid
    return open_folder(given.fetch_folder(), given.name, digest_of=lambda _: "")
