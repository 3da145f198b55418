"""Mutated recipes through `gradmap check`: valid or exit code 2, at once, and nothing is written, started or sent."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from gradmap_pipeline.cli import app

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent.parent
COUNT = 5000
SECONDS = 5
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**23, 10**40, 1e308, -0.0, 1e-320, 0.5),
    *(
        float("inf"),
        float("-inf"),
        float("nan"),
        [],
        {},
        [[]],
        [None],
        {"": 1},
        {"a": {"b": {}}},
        "",
        " ",
        "~",
        "~/x",
        "/",
        ".",
        "..",
    ),
    *(
        "\0",
        "a\0b",
        "\x1b[31m",
        "é",
        "数据",
        "🙂",
        "\ud83d",
        "\u202e",
        "\ufeff",
        "x" * 300,
        "x" * 5000,
        "a/" * 3000,
        "../" * 50,
        "%s",
        "{}",
    ),
    *("<<", "*a", "&a", "!!python/object:os.system", "null", "true", "1e3", "0x10", "-", "model.model", "calibrate.calibration"),
    *("heldout", "docs-llama", "owner/name", "a/b/c", "http://x/y", "file:///etc", "/dev/zero", "/proc/self/mem", "/etc/passwd"),
    *(
        "$HOME",
        "`touch ran`",
        "$(touch ran)",
        "; touch ran",
        "0.5",
        "all",
        "auto",
        "cuda",
        "none",
        "[1, 2]",
        "{a: 1}",
        -1.5,
        3,
        12,
        100,
    ),
]
SNIPPETS = [
    *(
        "<<: *a\n",
        "&a ",
        "*a ",
        "- ",
        "? ",
        ": ",
        "\n",
        "\t",
        "  ",
        "#",
        "|\n",
        ">\n",
        "'",
        '"',
        "[",
        "]",
        "{",
        "}",
        ",",
        "!",
        "!!",
        "%",
        "@",
    ),
    *(
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "\0",
        "\x07",
        "\r",
        "\u2028",
        "\ufeff",
        "é",
        "\U0001f642",
        "<<: [*a, *b]\n",
        "{<<: *a}",
        "~",
        "null",
    ),
    *(
        "!!python/object/apply:os.system ['touch ran']",
        "!function x.y",
        "[" * 200,
        "{a: " * 200,
        "- " * 200,
        "9" * 5000,
        "1e400",
        ".nan",
        "-.inf",
    ),
]


def seeds() -> list[str]:
    files = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "docs").glob("*.md"))]
    texts = []
    for file in files:
        text = file.read_text()
        texts += [text] if file.suffix == ".yaml" else re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    merged = (
        "version: 1\nmodel: {builtin: docs-llama}\nseed: 1\nsteps:\n"
        "  - use: evaluate\n    with: &a {dataset: {builtin: heldout}, samples: 4}\n"
        "  - use: evaluate\n    id: b\n    with: {<<: *a, samples: 6}\n    run: {python: python3}\n"
        "  - use: evaluate_lm_eval\n    with: {tasks: [x], task_folder: ., limits: {x.acc: 0.5}}\n    from: {model: model.model}\n"
    )
    return [text for text in texts if text.startswith("version")] + [merged] * 5


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def mutate_tree(source: random.Random, text: str) -> str:
    tree = yaml.safe_load(text)
    for _ in range(source.choice([1, 1, 1, 2, 3, 8])):
        path = source.choice([path for path in places(tree) if path] or [()])
        if not path:
            break
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        key = path[-1]
        action = source.randrange(6)
        if action == 0:
            del parent[key]
        elif action == 1:
            parent[key] = copy.deepcopy(source.choice(ODD))
        elif action == 2:
            parent[key] = [copy.deepcopy(parent[key])] * source.choice([1, 2, 50])
        elif action == 3:
            for _ in range(source.choice([1, 5, 100])):
                parent[key] = {source.choice(["a", "with", "path", "dataset", "<<"]): parent[key]}
        elif action == 4 and isinstance(parent, dict):
            parent[str(source.choice(ODD))[:200]] = parent.pop(key)
        else:
            other = tree
            for step in source.choice(list(places(tree))):
                other = other[step]
            parent[key] = copy.deepcopy(other)
    return write_tree(source, tree)


def write_tree(source: random.Random, tree: Any) -> str:
    if source.random() < 0.5:
        return json.dumps(tree, ensure_ascii=source.random() < 0.5).encode("utf-8", "replace").decode()
    try:
        return str(yaml.safe_dump(tree, sort_keys=False, default_flow_style=source.choice([None, True, False])))
    except RecursionError:  # PyYAML writes no deeper than it reads
        return json.dumps(tree).encode("utf-8", "replace").decode()


def mutate_text(source: random.Random, text: str) -> str:
    for _ in range(source.choice([1, 1, 2, 4, 16])):
        start = source.randrange(len(text) + 1)
        end = min(len(text), start + source.choice([0, 1, 1, 3, 10, 60]))
        action = source.randrange(5)
        if action == 0:
            text = text[:start] + text[end:]
        elif action == 1:
            text = text[:start] + source.choice(SNIPPETS) + text[start:]
        elif action == 2:
            text = text[:end] + text[start:end] * source.choice([1, 2, 30]) + text[end:]
        elif action == 3:
            text = text[:start] + source.choice(SNIPPETS) + text[end:]
        else:
            lines = text.splitlines(keepends=True) or [""]
            lines.insert(source.randrange(len(lines)), lines[source.randrange(len(lines))])
            text = "".join(lines)
    return text


def mutate_bytes(source: random.Random, text: str) -> bytes:
    content = text.encode(source.choice(["utf-8"] * 20 + ["utf-16", "latin-1", "utf-8-sig"]), "replace")
    if source.random() < 0.1 and content:
        changed = bytearray(content)
        for _ in range(source.choice([1, 4])):
            changed[source.randrange(len(changed))] = source.randrange(256)
        content = bytes(changed[: source.choice([None, len(changed) // 2])])
    return content


class Watch:
    """What a command does to the world besides reading."""

    def __init__(self) -> None:
        self.is_on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        place = place_of(event, arguments)
        if ".gradmap.partial-" in place or place == os.devnull or (event in ("open", "os.mkdir") and os.path.isdir(place)):
            return  # a folder of the process alone, for what transformers reads; a file without a name
        if event == "subprocess.Popen" and "from importlib.metadata import" in str(arguments[1]):
            return  # the Python that a recipe names is asked what it has
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_write or event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.mkdir",
            "os.remove",
            "os.rename",
            "socket.connect",
        ):
            self.seen.append(f"{event} {arguments}")


def place_of(event: str, arguments: tuple[Any, ...]) -> str:
    """The path that an event is about, in full where it is given by a folder that is open; nothing for other events."""
    if event not in ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        return ""
    place, folder = str(arguments[0]), arguments[-1]
    is_inside = event in ("os.remove", "os.rmdir") and isinstance(folder, int) and folder >= 0
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), place) if is_inside else place


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_mutated_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, texts, watch, codes = random.Random(1), seeds(), Watch(), {0: 0, 2: 0}
    ways: list[Callable[[random.Random, str], str]] = [mutate_tree, mutate_text]
    CliRunner().invoke(app, ["check", "r.yaml"])  # imports what it needs
    for number in range(COUNT):
        content = mutate_bytes(source, source.choice(ways)(source, source.choice(texts)))
        options: list[str] = []
        if source.random() < 0.1:
            value = str(source.choice(ODD)) + source.choice(["", *SNIPPETS])
            options = ["--set", source.choice(["model", "seed", "prune.ratio", "evaluate.dataset.path", "x", ""]) + "=" + value]
        Path("r.yaml").write_bytes(content)
        watch.is_on = True
        try:
            with at_most(SECONDS):
                result = CliRunner().invoke(app, ["check", "r.yaml", *options])
        except TimeoutError as error:
            result, problem = None, str(error)
        finally:
            watch.is_on = False
        if result is not None:
            is_clean = result.exception is None or isinstance(result.exception, SystemExit)
            problem = "" if is_clean and result.exit_code in codes else f"exit code {result.exit_code}: {result.exception!r}"
            problem = problem or ("Traceback" in result.output) * "a traceback" or "; ".join(watch.seen)
            problem = problem or (os.listdir() != ["r.yaml"]) * f"files: {os.listdir()}"
            problem = problem or (result.exit_code == 2 and not result.stderr.strip()) * "nothing is said"
        assert not problem, f"recipe {number}: {problem}\noptions {options!r}\n{content!r}\n{result and result.output}"
        assert result is not None
        codes[result.exit_code] += 1
    assert codes[0] > COUNT / 100, codes
    assert codes[2] > COUNT / 2, codes
