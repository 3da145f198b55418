"""What the end of a command that was interrupted says of its work."""

from __future__ import annotations

import pytest

from gradmap_pipeline.cli import app
from gradmap_pipeline.interruptions import _KEEP_NOTHING, explain_interruption


@pytest.mark.parametrize("command", ["plan", "init", "check"])
def test_a_command_that_keeps_nothing_says_so(command: str) -> None:
    assert explain_interruption([command, "r.yaml"]) == "interrupted; nothing was changed"


@pytest.mark.parametrize("arguments", [["run", "plan"], ["compare", "r.yaml"], []])
def test_a_command_that_goes_on_says_so(arguments: list[str]) -> None:
    assert explain_interruption(arguments) == "interrupted; what is finished is kept: run the same command to go on"


def test_the_names_are_those_of_commands() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert names >= _KEEP_NOTHING
