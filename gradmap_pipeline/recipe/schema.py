"""JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from pydantic import PydanticUserError
from pydantic.json_schema import DEFAULT_REF_TEMPLATE

from ..stages.stage import Stage
from .catalog import Catalog
from .recipe import SHARED, RecipeFile, RecipeStep


def make_options_schema(stage: type[Stage], references: str = DEFAULT_REF_TEMPLATE) -> dict[str, Any]:
    """The schema of a stage's options; of any mapping, where an option is of a kind that JSON Schema has no words for."""
    try:
        return stage.model_json_schema(ref_template=references)
    except PydanticUserError:
        return {"type": "object"}


def make_schema(catalog: Catalog) -> dict[str, Any]:
    """A recipe's schema (draft 2020-12), with the options of every stage in the catalog."""
    schema = RecipeFile.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    definitions.pop("RecipeStep", None)
    step = RecipeStep.model_json_schema(by_alias=True)
    choices = []
    for name, stage in sorted(catalog.stages.items()):
        options = make_options_schema(stage, "#/$defs/{model}")
        definitions |= options.pop("$defs", {})
        options["description"] = (stage.__doc__ or "").strip()
        _add_old_names(options, stage)
        definitions[f"options of {name}"] = options
        names = {"enum": [name, *stage.aliases]} if stage.aliases else {"const": name}
        properties = {**step["properties"], "use": names, "with": {"$ref": f"#/$defs/options of {name}"}}
        required = ["use", "with"] if options.get("required") else ["use"]
        choice = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        choices.append({**choice, "deprecated": True} if stage.deprecated else choice)
    schema["properties"]["steps"]["items"] = {"oneOf": choices}
    schema["patternProperties"] = {f"^{SHARED}": {"description": "A block that other places take in by its anchor."}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "gradmap recipe", **schema, "$defs": definitions}


def _add_old_names(options: dict[str, Any], stage: type[Stage]) -> None:
    """Options under the names that they had, each of which stands for the present one."""
    properties = options.get("properties", {})
    for old, new in stage.renamed.items():
        if new in properties:
            properties[old] = {**properties[new], "deprecated": True, "description": f"Is now called {new!r}."}
    if "required" in options:
        options["required"] = [name for name in options["required"] if name not in stage.renamed.values()]
