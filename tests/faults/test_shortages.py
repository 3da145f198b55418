"""A full disk and a lack of memory are exit code 3 with the place and what to do, whichever library met them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradmap_pipeline.errors import StageError
from gradmap_pipeline.machine.shortages import Shortage, find_shortage, find_shortage_in

pytestmark = [pytest.mark.full, pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts of Linux")]

WRITERS = """
import json, shutil, sys
from pathlib import Path
import numpy, onnx, onnx_ir, torch
import pyarrow, pyarrow.parquet
from safetensors.torch import save_file
from gradmap_pipeline.machine.shortages import find_shortage

place, source = Path(sys.argv[1]), Path(sys.argv[2])
values = torch.zeros(1 << 19)
tensor = onnx.numpy_helper.from_array(values.numpy(), "w")
inputs, outputs = (onnx.helper.make_tensor_value_info(name, 1, [1 << 19]) for name in "xy")
graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [inputs], [outputs], [tensor])
model = onnx.helper.make_model(graph)
table = pyarrow.table({"a": numpy.random.default_rng(0).random(1 << 19)})

def write_text(file):
    with file.open("w") as stream:
        stream.write("x" * (1 << 21))

def copy_folder(file):
    shutil.copytree(source, file)

WRITERS = {
    "python": write_text,
    "path": lambda file: file.write_bytes(bytes(1 << 21)),
    "safetensors": lambda file: save_file({"a": values}, file),
    "numpy tofile": lambda file: values.numpy().tofile(file),
    "numpy save": lambda file: numpy.save(file.with_suffix(".npy"), values.numpy()),
    "torch": lambda file: torch.save(values, file),
    "torch legacy": lambda file: torch.save(values, file, _use_new_zipfile_serialization=False),
    "onnx": lambda file: onnx.save(model, file),
    "onnx_ir": lambda file: onnx_ir.save(onnx_ir.from_proto(model), file, external_data="data"),
    "parquet": lambda file: pyarrow.parquet.write_table(table, file, compression=None, use_dictionary=False),
    "copyfile": lambda file: shutil.copyfile(source / "big", file),
    "copytree": copy_folder,
}
told = {}
for name, write in WRITERS.items():
    folder = place / name
    folder.mkdir()
    try:
        write(folder / "file")
        told[name] = None
    except BaseException as error:
        shortage = find_shortage(error)
        told[name] = [type(error).__name__, str(error)] if shortage is None else [shortage.resource, shortage.explain([place])]
    shutil.rmtree(folder)
print(json.dumps(told))
"""
NAMED = {"copytree"}
"""Writers whose error names the file."""


def run_writers(place: Path, source: Path, limit: str = "") -> dict[str, list[str] | None]:
    source.mkdir()
    (source / "big").write_bytes(bytes(1 << 21))
    done = subprocess.run(
        [sys.executable, "-c", limit + WRITERS, str(place), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, list[str] | None] = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 12
    return told


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB; only root may have one."""
    yield from mount(tmp_path / "disk", "1m")


def mount(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a disk of its own")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_full_disk_whoever_writes(tiny_disk: Path, tmp_path: Path) -> None:
    for name, said in run_writers(tiny_disk, tmp_path / "source").items():
        assert said is not None, name
        assert said[0] == "disk", (name, said)
        assert "free space there" in said[1]
        if name in NAMED:
            assert str(tiny_disk / name) in said[1]


def test_limit_on_the_size_of_files_whoever_writes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE; pyarrow and others say EFBIG, which needs no root to try."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
    (tmp_path / "place").mkdir()
    for name, said in run_writers(tmp_path / "place", tmp_path / "source", limit).items():
        assert said is not None, name
        assert said[0] == "disk", (name, said)


def test_full_disk_is_named_by_what_is_free(tiny_disk: Path) -> None:
    said = Shortage("disk", "Error while serializing: No space left on device (os error 28)").explain([tiny_disk / "a" / "b"])
    assert said.startswith(f"ran out of disk at {str(tiny_disk / 'a' / 'b')!r}: Error while serializing: ")


STEPS = [
    {"use": "calibrate", "with": {"samples": 64, "sequence_length": 64}},
    {"use": "gradmap_score", "with": {"layers": 2}},
    {"use": "prune", "with": {"layers": 2}},
    {"use": "project_compensate"},
    {"use": "export", "with": {"to": "out"}},
]


def write_recipe(folder: Path, model: Path, text: Path) -> None:
    steps = json.loads(json.dumps(STEPS))
    steps[0]["with"]["dataset"] = {"path": str(text)}
    (folder / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))


def gradmap(folder: Path, *arguments: str, prefix: str = "", **variables: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "gradmap_pipeline", *arguments]
    done = subprocess.run(
        ["bash", "-c", f'{prefix} exec "$@"', "bash", *command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("place", ["store", pytest.param("out", marks=pytest.mark.slow)])
def test_whole_run_on_a_small_disk(place: str, tmp_path: Path, llama: Path, text: Path) -> None:
    for disk in mount(tmp_path / "disk", "64k"):
        write_recipe(tmp_path, llama, text)
        places = {"store": "store", "out": "out", place: str(disk / "here")}
        options = ["--store", places["store"], "--set", f"export.to={places['out']}"]
        code, err = gradmap(tmp_path, "run", "r.yaml", *options, "--quiet")
        assert code == 3, err
        assert [line.partition(":")[0] for line in err.splitlines()] == ["error"]
        assert "ran out of disk" in err
        assert str(disk) in err
        assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_limit_on_the_size_of_files_of_a_whole_run(tmp_path: Path, llama: Path, text: Path) -> None:
    """`ulimit -f` counts blocks of 1 KiB."""
    write_recipe(tmp_path, llama, text)
    code, err = gradmap(tmp_path, "run", "r.yaml", "--quiet", prefix="ulimit -f 64;")
    assert code == 3, err
    assert re.fullmatch(
        r"error: step '[a-z_]+': stage '[a-z_]+' could not write a file at '.*\.safetensors': .*File too large.*; "
        r"the limit of this process on file size \(ulimit -f\) is 0\.0625 MiB, so raise or remove it\n",
        err,
    ), err


@pytest.mark.parametrize("mebibytes", [64, 700])
def test_address_space_too_small_for_any_run(mebibytes: int, tmp_path: Path, llama: Path, text: Path) -> None:
    write_recipe(tmp_path, llama, text)
    code, err = gradmap(tmp_path, "run", "r.yaml", "--quiet", prefix=f"ulimit -v {mebibytes << 10};")
    said = f"the limit on address space (ulimit -v) is {mebibytes} MiB, and torch and transformers alone need 1536 MiB"
    assert (code, err) == (3, f"error: {said}; raise or remove it\n")


@pytest.mark.slow
def test_address_space_just_too_small(tmp_path: Path, llama: Path, text: Path) -> None:
    write_recipe(tmp_path, llama, text)
    code, err = gradmap(tmp_path, "run", "r.yaml", "--quiet", prefix=f"ulimit -v {1540 << 10};")
    assert code in (0, 3)
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error"] * (code == 3)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "plan", "compare"])
def test_many_limits_on_address_space(command: str, tmp_path: Path, llama: Path, text: Path) -> None:
    write_recipe(tmp_path, llama, text)
    recipe = json.loads((tmp_path / "r.yaml").read_text())
    recipe["steps"].insert(-1, {"use": "evaluate", "with": recipe["steps"][0]["with"]})
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    codes = {}
    for mebibytes in (40, 100, 800, *range(1536, 2400, 80), 4096):
        shutil.rmtree(tmp_path / ".gradmap", ignore_errors=True)
        codes[mebibytes], err = gradmap(
            tmp_path, command, "r.yaml", "--set", "export.to=exported", prefix=f"ulimit -v {mebibytes << 10};"
        )
        assert codes[mebibytes] in (0, 3), (mebibytes, err)
    assert codes[4096] == 0


ABORTS = """
from pydantic import BaseModel
from gradmap_pipeline import Artifact, ModelGraph, Stage, hookimpl
class Told(Artifact):
    pass
class Aborts(Stage):
    \"\"\"Abort.\"\"\"
    name = "aborts"
    class Inputs(BaseModel):
        model: ModelGraph
    class Outputs(BaseModel):
        told: Told
    def run(self, inputs, context):
        import os
        os.abort()
@hookimpl
def gradmap_stages():
    return [Aborts]
"""


def test_abort_under_a_limit_on_address_space(tmp_path: Path, llama: Path) -> None:
    """As of a library that throws std::bad_alloc where nobody catches it."""
    (tmp_path / "p.py").write_text(ABORTS)
    (tmp_path / "r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [{"use": "aborts"}]}))
    code, err = gradmap(tmp_path, "run", "r.yaml", "--plugin", "p.py", "--quiet", prefix="ulimit -v 8000000; ulimit -c 0;")
    assert code == 3
    said = "a library was ended by SIGABRT under the limit of 7812 MiB (ulimit -v); raise or remove the limit"
    assert err == f"error: ran out of address space: {said}\n"


@pytest.mark.parametrize(
    ("error", "resource", "path"),
    [
        (MemoryError(), "memory", None),
        (OSError(12, "Cannot allocate memory"), "memory", None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"), "memory", None),
        (RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"), "memory", None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "memory", None),
        (RuntimeError("std::bad_alloc"), "memory", None),
        (Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer"), "memory", None),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory", None),
        (ImportError("libgomp.so.1: cannot allocate memory in static TLS block"), "memory", None),
        (RuntimeError("can't start new thread"), "memory", None),
        (OSError(28, "No space left on device", "/data/x"), "disk", "/data/x"),
        (OSError(122, "Disk quota exceeded", "/data/x"), "disk", "/data/x"),
        (OSError(27, "File too large", "a", None, "b"), "disk", "b"),
        (shutil.Error([("a", "/full/b", "[Errno 28] No space left on device")]), "disk", "/full/b"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "disk", None),
        (OSError("1048576 requested and 131072 written"), "disk", None),
        (ImportError("libx.so: failed to map segment from shared object: Operation not permitted"), None, None),
        (ValueError("the file is too large a number"), None, None),
        (OSError(2, "No such file or directory", "/data/x"), None, None),
        (StageError("not enough memory in the name of an option"), None, None),
    ],
)
def test_words_of_libraries(error: BaseException, resource: str | None, path: str | None) -> None:
    shortage = find_shortage(error)
    assert (shortage and shortage.resource, shortage and shortage.path) == (resource, path)
    wrapped = StageError("the step failed")
    wrapped.__cause__ = error
    shortage = find_shortage(wrapped)
    assert (shortage and shortage.resource) == resource


def test_words_of_other_processes() -> None:
    text = "Collecting x\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\nhint\n"
    shortage = find_shortage_in(text)
    assert shortage is not None
    assert (shortage.resource, shortage.detail) == ("disk", text.splitlines()[1])
    assert find_shortage_in("fine\n") is None
