"""What the shell offers for an argument that is half written.

This module imports nothing that takes time, since each press of a key waits for it.
"""

from __future__ import annotations

from pathlib import Path

_RECIPES = (".yaml", ".yml")


def complete_stage(incomplete: str) -> list[str]:
    """Names of plugins that are installed; each that ships has one stage of its name."""
    from importlib.metadata import entry_points

    return sorted({point.name for point in entry_points(group="gradmap") if point.name.startswith(incomplete)})


def complete_shipped_recipe(incomplete: str) -> list[str]:
    """Recipes that come with the package."""
    from importlib.resources import files

    names = [file.name.removesuffix(".yaml") for file in files("gradmap_recipes").iterdir() if file.name.endswith(".yaml")]
    return sorted(name for name in names if name.startswith(incomplete))


def complete_dtype(incomplete: str) -> list[str]:
    """Types to compute in."""
    return [name for name in ("float32", "bfloat16", "float16") if name.startswith(incomplete)]


def complete_recipe_file(incomplete: str) -> list[str]:
    """Recipe files, and folders that may hold some."""
    folder, _, name = incomplete.rpartition("/")
    place = Path(f"{folder}/" if incomplete.startswith("/") else folder or ".").expanduser()
    before = f"{folder}/" if "/" in incomplete else ""
    try:
        items = sorted(place.iterdir())
    except OSError:
        return []
    wanted = [item for item in items if item.name.startswith(name) and (name.startswith(".") or not item.name.startswith("."))]
    return [f"{before}{item.name}{'/' if item.is_dir() else ''}" for item in wanted if item.is_dir() or item.suffix in _RECIPES]
