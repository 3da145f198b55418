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
    """A recipe's schema (draft 2020-12), with the options of every stage in the catalog.

    Names of stages are one list with what each does, and the options of a step follow from its name: so an editor completes all
    names, and speaks of the options of the stage that stands there alone.
    """
    schema = RecipeFile.model_json_schema(by_alias=True)
    definitions = schema.setdefault("$defs", {})
    definitions.pop("RecipeStep", None)
    step = RecipeStep.model_json_schema(by_alias=True)
    names: dict[str, str] = {}
    conditions = []
    for name, stage in sorted(catalog.stages.items()):
        options = make_options_schema(stage, "#/$defs/{model}")
        definitions |= options.pop("$defs", {})
        options["description"] = (stage.__doc__ or "").strip()
        _add_old_names(options, stage)
        definitions[f"options-of-{name}"] = options
        names[name] = options["description"].partition("\n")[0]
        if stage.deprecated:
            names[name] = f"Deprecated. {names[name]}"
        names |= dict.fromkeys(stage.aliases, f"Is now called {name!r}. {names[name]}")
        then: dict[str, Any] = {"properties": {"with": {"$ref": f"#/$defs/options-of-{name}"}}}
        if options.get("required"):
            then["required"] = ["with"]
        pattern = f"^({'|'.join([name, *stage.aliases])})$"  # an editor takes the beginning of a name in an enum for the name
        used = {"properties": {"use": {"type": "string", "pattern": pattern}}, "required": ["use"]}
        conditions.append({"if": used, "then": then})
    use = {"description": "The stage.", "enum": list(names), "enumDescriptions": list(names.values())}
    properties = {**step["properties"], "use": use, "with": {"description": "Options of the stage.", "type": "object"}}
    items = {"type": "object", "properties": properties, "required": ["use"], "additionalProperties": False, "allOf": conditions}
    schema["properties"]["steps"]["items"] = items
    schema["patternProperties"] = {f"^{SHARED}": {"description": "A block that other places take in by its anchor."}}
    schema["$defs"] = definitions
    _drop_titles(schema)
    for name in catalog.stages:
        definitions[f"options-of-{name}"]["title"] = name
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "gradmap recipe", **schema}


def _add_old_names(options: dict[str, Any], stage: type[Stage]) -> None:
    """Options under the names that they had, each of which stands for the present one."""
    properties = options.get("properties", {})
    for old, new in stage.renamed.items():
        if new in properties:
            properties[old] = {**properties[new], "deprecated": True, "description": f"Is now called {new!r}."}
    if "required" in options:
        options["required"] = [name for name in options["required"] if name not in stage.renamed.values()]


def _drop_titles(schema: Any) -> None:
    """Take out the titles that pydantic makes of names; editors would show them above what a description says."""
    if isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        for part in schema.values():
            _drop_titles(part)
    elif isinstance(schema, list):
        for part in schema:
            _drop_titles(part)
