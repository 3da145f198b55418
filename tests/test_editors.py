"""The schema of recipes in a YAML language server, as editors run one (npm install yaml-language-server); left out without."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.recipe.schema import make_schema

SERVER = shutil.which("yaml-language-server")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SERVER is None, reason="there is no yaml-language-server")]
RECIPE = """\
version: 1
model: {builtin: docs-llama}
steps:
  - use: gr
  - use: prune
    with:
      ratio: 0.2
      lay: 3
  - use: export
    with:
      to: out
      f
"""


class Server:
    """A language server with one open recipe."""

    def __init__(self, schema: Path) -> None:
        assert SERVER is not None
        self.process = subprocess.Popen([SERVER, "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.settings = {"schemas": {schema.as_uri(): "*.yaml"}, "completion": True, "hover": True, "validate": True}
        self.number, self.problems = 0, []  # type: int, list[dict[str, Any]]
        asked = {"configuration": True}
        self.ask("initialize", {"processId": None, "rootUri": None, "capabilities": {"workspace": asked}})
        self.send({"method": "initialized", "params": {}})
        self.send({"method": "workspace/didChangeConfiguration", "params": {"settings": {"yaml": self.settings}}})
        self.document = {"uri": "file:///recipe.yaml"}
        opened = {**self.document, "languageId": "yaml", "version": 1, "text": RECIPE}
        self.send({"method": "textDocument/didOpen", "params": {"textDocument": opened}})

    def at(self, method: str, line: int, character: int) -> Any:
        place = {"line": line, "character": character}
        return self.ask(f"textDocument/{method}", {"textDocument": self.document, "position": place})

    def ask(self, method: str, params: Any) -> Any:
        self.number += 1
        self.send({"id": self.number, "method": method, "params": params})
        while True:
            answer = self.read()
            if answer.get("id") == self.number and "method" not in answer:
                return answer["result"]

    def read(self) -> dict[str, Any]:
        """The next message; what the server asks for is answered."""
        assert self.process.stdout is not None
        length = 0
        while line := self.process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        message: dict[str, Any] = json.loads(self.process.stdout.read(length))
        if message.get("method") == "textDocument/publishDiagnostics":
            self.problems = message["params"]["diagnostics"]
        elif message.get("method") == "workspace/configuration":
            parts = [self.settings if item.get("section") == "yaml" else {} for item in message["params"]["items"]]
            self.send({"id": message["id"], "result": parts})
        elif "id" in message and "method" in message:
            self.send({"id": message["id"], "result": None})
        return message

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        text = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(text), text))
        self.process.stdin.flush()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(make_schema(load_catalog())))
    server = Server(schema)
    while not server.problems:  # until the server has the schema
        server.read()
    yield server
    with server.process:
        server.process.kill()


def test_an_editor_completes_names_and_options_of_the_stage_that_is_there(server: Server) -> None:
    names = {one["label"]: one.get("documentation") for one in server.at("completion", 3, 11)["items"]}
    assert names.keys() == load_catalog().stages.keys()
    assert all(names.values())
    options = {one["label"]: one.get("documentation") for one in server.at("completion", 11, 7)["items"]}
    assert "format" in options
    assert "converter" not in options  # which belongs to export_gguf
    assert "Share of the layers to remove" in server.at("hover", 6, 8)["contents"]["value"]
    assert "* `prune`: Remove the least important layers" in server.at("hover", 4, 10)["contents"]["value"]


def test_an_editor_marks_the_line_of_a_mistake(server: Server) -> None:
    marked = {problem["range"]["start"]["line"]: problem["message"] for problem in server.problems}
    assert "gradmap_score" in marked[3]
    assert marked[7] == "Property lay is not allowed."
    assert not {4, 5, 6, 8, 9, 10} & marked.keys()
