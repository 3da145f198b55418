"""Jinja templates of tasks, read without rendering them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .settings import Value

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_decontamination_query", "description", "gen_prefix")
"""Settings that lm-eval renders with the fields of a row."""


def find_template_fault(name: str, value: Value) -> str | None:
    """Why a template is none."""
    from jinja2 import TemplateSyntaxError

    try:
        _make_environment().from_string(value.text or "")
    except TemplateSyntaxError as error:
        return f"{value.where}: {name} is {value.describe()}, which is no Jinja template: {error.message}"
    return None


def find_fields(value: Value) -> Iterator[str]:
    """Fields of a row that a template must have: those it does not test for first, as `is defined` and `default` do."""
    from jinja2 import meta, nodes

    environment = _make_environment()
    tree = environment.parse(value.text or "")
    optional = {
        inner.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d")
        for inner in node.find_all(nodes.Name)
    }
    yield from sorted(meta.find_undeclared_variables(tree) - optional - set(environment.globals))


def _make_environment() -> Any:
    """One with lm-eval's filters."""
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment()
    with suppress(ImportError, AttributeError):
        from lm_eval.utils import env

        environment.filters.update(env.filters)
    return environment
