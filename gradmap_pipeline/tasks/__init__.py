"""Folders of lm-eval tasks: what they name, whether they hold code, and how their data are found."""

from __future__ import annotations

from .folder import TaskFolder

__all__ = ["TaskFolder"]
