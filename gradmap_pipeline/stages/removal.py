"""Which layers a removal may take: how many, and, by a config, which ones leave a model that it can say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..checkpoint.cadence import choose_kept, count_removable, find_period, is_regular, strict_cadences_of
from ..checkpoint.depth import check_removable, count_layers, find_sources, prune_fields
from ..errors import ModelError, OptionError, StageError

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from .layer_scores import LayerScores


def count_removed(depth: int, ratio: float) -> int:
    """`ratio` of `depth` layers, rounded to the nearest whole number, at least 1."""
    return max(1, round(ratio * depth))


def choose_expressible(model: ModelGraph, scores: LayerScores, count: int, *, regular: bool) -> list[int]:
    """The layers to remove, with base numbering: of the removals that the config can say, the one of least total score.

    `regular`: only removals that keep the period of the layers' kinds. Raises `StageError` where each takes a protected layer.
    """
    from ..checkpoint.architecture import full_config

    config = full_config(model.base.folder)
    fixed = {*scores.protected, *find_sources(config)} & set(model.layers)
    importance = {layer: scores.decisions[0].scores.get(layer, 0.0) for layer in model.layers}  # some leave protected layers out
    kept = choose_kept(config, model.base.layers, len(model.layers) - count, importance, fixed, regular=regular)
    if not kept:
        keeps = "keeps the period of their kinds" if regular else "a config can express"
        raise StageError(
            f"every removal of {count} of {len(model.layers)} layers that {keeps} takes one of layers "
            f"{', '.join(map(str, sorted(fixed)))}, which are protected; protect fewer in the step that scores"
        )
    return [layer for layer in model.layers if layer not in kept]


def check_regular_removal(config: dict[str, Any], layers: tuple[int, ...], count: int, kept: tuple[int, ...] | None) -> None:
    """Raise `OptionError` of 'among' or 'layers' unless the kinds of layers keep their period, or have one that can be kept.

    `config`: of the decoder. `layers`: those before. `count`: how many of them are removed. `kept`: those that stay, where that is
    known; base numbering.
    """
    depth = count_layers(config) or len(layers)
    if find_period(config, depth) is None:
        raise OptionError("among", f"the kinds of the model's {depth} layers have no period to keep; use `any` or `expressible`")
    if kept is not None and not is_regular(config, depth, kept):
        possible = choose_kept(config, depth, len(layers) - count, _prefer_ends(layers), regular=True)
        example = f"; possible, for instance: remove {_name_others(layers, possible)}" if possible else ""
        raise OptionError("layers", f"the layers that would be left do not keep the period of their kinds{example}")


def check_removal_by_config(
    config: dict[str, Any], layers: tuple[int, ...], count: int, kept: tuple[int, ...] | None, option: str, *, is_free: bool
) -> None:
    """Raise `OptionError`, with the removals that are possible, where the config cannot say what would be left.

    `layers`, `count`, `kept`: as in `check_regular_removal`. `option`: the one that says how many layers are removed. `is_free`:
    whether layers are chosen by their scores alone.
    """
    depth = count_layers(config) or len(layers)
    try:
        check_removable(config)
        if kept is not None:
            prune_fields(config, config, kept)
    except ModelError as error:
        raise OptionError(option, f"{error}{_name_possible(config, depth, layers, count)}") from None
    if kept is not None or not strict_cadences_of(config):
        return
    if not choose_kept(config, depth, len(layers) - count, dict.fromkeys(layers, 1.0)):
        refusal = f"no removal of {count} of {len(layers)} layers leaves a model that its config can express"
        raise OptionError(option, f"{refusal}{_name_possible(config, depth, layers, count)}")
    if is_free:
        fields = ", ".join(repr(field) for cadence in strict_cadences_of(config) for field in cadence.fields)
        raise OptionError(
            option,
            f"config fields {fields} place layers by a cadence, which most removals break; set `among: expressible` to choose "
            f"only among those that do not{_name_possible(config, depth, layers, count)}",
        )


def _name_possible(config: dict[str, Any], depth: int, layers: tuple[int, ...], count: int) -> str:
    """What a cadence leaves possible, as the end of a message; nothing where there is no cadence."""
    if not strict_cadences_of(config):
        return ""
    kept = choose_kept(config, depth, len(layers) - count, _prefer_ends(layers))
    if kept:
        return f"; possible, for instance: remove {_name_others(layers, kept)}"
    counts = count_removable(config, depth, layers)
    return f"; possible: removals of {', '.join(map(str, counts))} layers" if counts else "; no removal does"


def _prefer_ends(layers: tuple[int, ...]) -> dict[int, float]:
    """Importance that spares the first and the last layer, for examples."""
    return dict.fromkeys(layers, 1.0) | {layers[0]: 2.0, layers[-1]: 2.0}


def _name_others(layers: tuple[int, ...], kept: tuple[int, ...]) -> str:
    return ", ".join(str(layer) for layer in layers if layer not in kept)
