"""Mutated data files of every kind: read, or refused by a documented error, at once."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

pytestmark = pytest.mark.full

COUNT = 200
ROUNDS = 5
READ = """
import signal, sys
from pathlib import Path
from pydantic import ValidationError
from gradmap_pipeline import DatasetSource
from gradmap_pipeline.data import load_tokenizer, make_sequences
from gradmap_pipeline.errors import GradmapError
from gradmap_pipeline.checkpoint.graph import open_folder
tokenizer = load_tokenizer(open_folder(Path(sys.argv[1])).base)
for line in sys.stdin:
    file = Path(line.rstrip("\\n"))
    signal.alarm(5)
    print(file.name, end=" ", flush=True)
    try:
        make_sequences(tokenizer, DatasetSource(path=file).documents(shuffle_seed=0), 16, 4, seed=0, embeddings=300)
        print("read", flush=True)
    except (GradmapError, ValidationError) as error:
        print("refused" if file.name in str(error) or "samples" in str(error) else f"says nothing: {error}", flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""
TEXTS = [f"text {number}, naïve 数据 🙂 " * (1 + number % 5) for number in range(300)]


def make_contents(folder: Path) -> dict[str, bytes]:
    lines = "".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(TEXTS)).encode()
    table = pa.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    for compression in ("none", "snappy", "zstd"):
        parquet.write_table(table, folder / f"{compression}.parquet", compression=compression, row_group_size=100)
    with pa.OSFile(str(folder / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    with pa.OSFile(str(folder / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    made = {file.name: file.read_bytes() for file in folder.iterdir()}
    return made | {
        "data.txt": "\n".join(TEXTS).encode(),
        "data.jsonl": lines,
        "data.json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False, indent=1).encode(),
        "data.csv": b"n,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(TEXTS)).encode(),
        "data.jsonl.gz": gzip.compress(lines, mtime=0),
        "data.jsonl.bz2": bz2.compress(lines),
        "data.jsonl.xz": lzma.compress(lines),
        "data.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
    }


def mutate(source: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    action = source.randrange(7)
    if action == 0:
        for _ in range(source.choice([1, 3, 30])):
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    elif action == 1:
        del changed[source.randrange(len(changed)) :]
    elif action == 2:
        start = source.randrange(len(changed))
        changed[start : start + source.choice([1, 8, 200])] = source.randbytes(source.choice([0, 1, 8, 200]))
    elif action == 3:
        return content.decode("utf-8", "ignore").encode(
            source.choice(["latin-1", "utf-16", "utf-32", "cp1252", "utf-8-sig"]), "replace"
        )
    elif action == 4:
        for old, new in (
            (b'"text', b"[1"),
            (b'"text"', b'"txt"'),
            (b"{", b"["),
            (b",", b""),
            (b'"', b""),
            (b"\n", b"\r"),
            (b"\n", b""),
        ):
            if source.random() < 0.3:
                changed = bytearray(bytes(changed).replace(old, new, source.choice([1, -1])))
    elif action == 5:
        start = source.randrange(len(changed))
        changed[start:start] = changed[: source.randrange(len(changed))]
    else:
        start = source.randrange(max(1, len(changed) - 4))
        changed[start : start + 4] = source.choice(
            [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"]
        )
    return bytes(changed)


@pytest.mark.slow
def test_mutated_data_files(llama: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    (tmp_path / "whole").mkdir()
    contents = make_contents(tmp_path / "whole")
    told = {"read": 0, "refused": 0}
    for _ in range(ROUNDS):
        files: list[Path] = []
        for number in range(COUNT):
            name = source.choice(sorted(contents))
            file = tmp_path / f"{number} {name}"
            other = source.choice(sorted(contents))
            file.write_bytes(mutate(source, contents[other if source.random() < 0.05 else name]))
            files.append(file)
        waiting = list(files)
        while waiting:  # a crash of a library ends the process, and is a failure all the same
            command = [sys.executable, "-c", READ, str(llama)]
            done = subprocess.run(command, input="\n".join(map(str, waiting)), capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines()
            for file, line in zip(waiting, lines, strict=False):
                said = line.removeprefix(f"{file.name} ")
                content = file.read_bytes()
                assert said in told, f"{file.name}: {said or 'ended the process'}\n{done.stderr[-2000:]}\n{content[:3000]!r}"
                told[said] += 1
            assert lines, done.stderr
            waiting = waiting[len(lines) :]
    assert told["read"] > 100, told
    assert told["refused"] > 100, told
