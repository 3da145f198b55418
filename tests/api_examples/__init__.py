"""Runnable examples of every public name, one file a group; `docs/api.md` shows them."""
