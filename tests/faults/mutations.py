"""Models with something wrong, made at random from a seed, and what a run makes of each: a process that the fuzz tests start.

`python mutations.py KIND FIRST LAST FOLDER` prints one JSON line for each number. The process may have few addresses more than its
libraries take, so that memory asked for by a number in a file is a failure.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

ADDRESSES = 8 << 30  # bytes; torch and its like take half of that
SECONDS = 5.0
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 31, 33, 64, 1000, 10**6, 10**9, 10**12, 2**31, 2**63, -(2**63), 10**30, 0.0, 0.5,
    -1.5, 1e30, float("nan"), float("inf"), "", "a", "32", "llama", "float16", "../x", "x" * 1000, [], [1], [[]], [None] * 4,
    ["full_attention"] * 4, ["full_attention"] * 3, {}, {"a": 1}, {"rope_type": "yarn"}, {"0": {}}, {"num_hidden_layers": 10**9},
]  # fmt: skip
# fmt: off
WAYS = [
    "bits", "bits", "bits", "length", "cut", "longer", "dtype", "shape", "offset", "offset", "swap", "same", "rename", "delete",
    "metadata", "add", "repeat", "repeat_entry", "spaces", "odd", "field", "list", "reorder", "empty", "turned",
]
FIELDS = [
    "text_config", "vision_config", "num_labels", "id2label", "layer_types", "sliding_window", "use_sliding_window",
    "quantization_config", "is_encoder_decoder", "auto_map", "attn_implementation", "_attn_implementation",
    "torch_dtype", "dtype", "pruned_heads", "head_dim", "rope_scaling", "partial_rotary_factor", "per_layer_config",
    "num_nextn_predict_layers", "num_kv_shared_layers", "configuration_files", "n_layer", "num_layers",
    "layers_block_type", "max_window_layers", "num_experts", "output_attentions", "use_cache", "return_dict",
    "tokenizer_class", "transformers_version", "architectures", "model_type", "attention_bias", "mlp_bias",
    "hidden_act", "name_or_path", "base_model_tp_plan", "chunk_size_feed_forward", "problem_type", "_name_or_path",
    "gradient_checkpointing",
]
TYPES = [
    "llama", "qwen3", "gpt2", "opt", "mixtral", "gemma3", "mistral", "bert", "t5", "mamba", "nothing", "gemma3_text",
    "phi3", "gpt_neo",
]
# fmt: on


def mutate_config(file: Path, source: random.Random) -> str:
    """Spoil config.json; say how."""
    config = json.loads(file.read_text())
    text = file.read_text()
    way = source.choice(("value",) * 10 + ("delete", "add", "add", "add", "type", "nest", "several", "bits", "cut", "repeat"))
    if way == "bits":
        data = bytearray(text.encode())
        for _ in range(source.randint(1, 4)):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        file.write_bytes(bytes(data))
        return "bits"
    if way == "cut":
        file.write_text(text[: source.randrange(len(text))])
        return "cut"
    if way == "repeat":
        field, value = source.choice(list(config)), source.choice(ODD)
        file.write_text("{" + f"{json.dumps(field)}: {json.dumps(value)}," + text.strip()[1:])
        return f"repeat {field} {value!r}"
    said = []
    for _ in range(3 if way == "several" else 1):
        field = source.choice(list(config) if way in ("value", "delete", "nest", "several") else FIELDS)
        value: Any = copy.deepcopy(source.choice(ODD))
        if way == "delete":
            config.pop(field, None)
        elif way == "type":
            field, value = "model_type", source.choice(TYPES)
            config[field] = value
        elif way == "nest":
            for _ in range(source.choice((1, 3, 70, 900))):
                value = [value] if source.random() < 0.5 else {"a": value}
            config[field] = value
        elif isinstance(config.get(field), int) and source.random() < 0.5:
            value = config[field] = source.choice(
                (config[field] + 1, config[field] - 1, config[field] * 2, config[field] // 2, -config[field])
            )
        else:
            config[field] = value
        said.append(f"{way} {field} {str(value)[:60]!r}")
    file.write_text(json.dumps(config))
    return "; ".join(said)


def mutate_header(file: Path, source: random.Random) -> str:  # noqa: PLR0912 - a branch for each way
    """Spoil the header of a safetensors file; say how."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = source.choice([name for name in header if name != "__metadata__"])
    other = source.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    way = source.choice(WAYS)
    raw: bytes | None = None
    size: int | None = None
    if way == "bits":
        spoilt = bytearray(data)
        for _ in range(source.randint(1, 3)):
            spoilt[source.randrange(8 + length)] ^= 1 << source.randrange(8)
        file.write_bytes(bytes(spoilt))
        return way
    if way == "length":
        size = source.choice((0, 1, length - 1, length + 1, length + 8, len(data), 10**8, 10**8 + 1, 2**63, 2**64 - 1))
    elif way == "cut":
        values = values[: source.randrange(len(values))]
    elif way == "longer":
        values += bytes(source.choice((1, 8, 4096)))
    elif way == "dtype":
        entry["dtype"] = source.choice(("F16", "BF16", "I32", "U32", "F64", "F8_E4M3", "F4", "C64", "f32", "", 3, None, "BOOL"))
    elif way == "shape":
        entry["shape"] = source.choice(
            (
                [],
                [-1],
                [*entry["shape"], 1],
                entry["shape"][::-1],
                [2**63, 2],
                [2**32, 2**32],
                [0],
                [1.0],
                "32",
                None,
                [[32]],
                [True],
                [entry["shape"][0] * 2, *entry["shape"][1:]],
            )
        )
    elif way == "offset":
        place = source.randrange(2)
        entry["data_offsets"][place] = source.choice(
            (
                0,
                -1,
                4,
                entry["data_offsets"][place] + source.choice((-4, 4, 1, -1)),
                2**63,
                2**70,
                1.5,
                None,
                "0",
                float(entry["data_offsets"][place]),
            )
        )
    elif way == "swap":
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[name]["data_offsets"]
    elif way == "same":
        entry["data_offsets"] = list(header[other]["data_offsets"])
    elif way == "rename":
        header[source.choice((name.upper(), "", "a" * 300, name + "\0", other, "../" + name, "model.layers.9.x", "ü"))] = (
            header.pop(name)
        )
    elif way == "delete":
        del header[name]
    elif way == "metadata":
        header["__metadata__"] = source.choice(
            ({}, {"format": "np"}, {"format": 3}, [], None, "x", {"a": None}, {"format": "pt", "a": "b" * 1000})
        )
    elif way == "add":
        at = source.choice((0, len(values), -1))
        header[source.choice(("extra", "model.layers.1.extra"))] = {
            "dtype": "F32",
            "shape": source.choice(([0], [1], [0, 5])),
            "data_offsets": [at, at],
        }
    elif way in ("repeat", "repeat_entry"):
        part = json.dumps(entry)
        whole = json.dumps(header)
        raw = (
            f"{{{json.dumps(name)}: {part}," + whole[1:]
            if way == "repeat"
            else whole.replace('"dtype"', '"shape": [1], "dtype"', 1)
        ).encode()
    elif way == "spaces":
        raw = source.choice((b" ", b"\n", b"\0", b"\xef\xbb\xbf")) * source.randint(1, 9) + json.dumps(header).encode()
        raw += source.choice((b"", b" ", b"\0", b"}"))
    elif way == "odd":
        header[name] = source.choice((None, 3, [], "x", {}, [entry["dtype"], entry["shape"], entry["data_offsets"]]))
    elif way == "field":
        entry[source.choice(("x", "Dtype", "name"))] = source.choice((1, None, [1, [2]], "y"))
    elif way == "list":
        raw = source.choice((b"[]", b"3", b"null", b"{}", b'"x"', b"[" * 5000, b"{" * 200, b'{"a":' * 500))
    elif way == "reorder":
        names = list(header)
        source.shuffle(names)
        header = {name: header[name] for name in names}
    elif way == "empty":
        raw = b""
    elif way == "turned":
        raw = (
            json.dumps(header)
            .encode("utf-16" if source.random() < 0.5 else "latin-1")
            .replace(b"model", b"mod\xe9l", source.randrange(2))
        )
    encoded = json.dumps(header).encode() if raw is None else raw
    file.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + values)
    return f"{way} {name}"


def is_sound(file: Path, original: dict[str, tuple[int, ...]]) -> bool:
    """Whether the safetensors library takes a file, and its tensors are those the config makes, each named once."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            parts = {name: opened.get_slice(name) for name in opened.offset_keys()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            floats = all(part.get_dtype() in ("F64", "F32", "F16", "BF16") for part in parts.values())
    except (SafetensorError, OSError):
        return False
    data = file.read_bytes()
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
    names: list[str] = []
    json.loads(header, object_pairs_hook=lambda pairs: names.extend(name for name, _ in pairs))
    return floats and shapes == original and all(names.count(name) == 1 for name in shapes)


class Late(BaseException):
    """A case took too long."""


def _stop(*_: object) -> None:
    raise Late


def run_case(folder: Path, text: Path) -> dict[str, Any]:
    """Exit codes of check and run, what they said, and how far the export is from what transformers loads."""
    from typer.testing import CliRunner

    from gradmap_pipeline.cli import app

    data = {"dataset": {"path": str(text)}, "samples": 2, "sequence_length": 16}
    steps = [
        {"use": "calibrate", "with": data},
        {"use": "export", "with": {"to": str(folder / "whole")}},
        {"use": "prune", "with": {"layers": [1]}},
        {"use": "export", "id": "pruned", "with": {"to": str(folder / "pruned")}},
    ]
    recipe = folder / "r.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(folder / "model")}, "steps": steps}))
    result: dict[str, Any] = {}
    started = time.process_time()
    for command in (["check", str(recipe)], ["run", str(recipe), "--quiet", "--store", str(folder / "store")]):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            done = CliRunner().invoke(app, command)
        except Late:
            return {"error": f"{command[0]}: over {SECONDS} s", "code": None}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        result |= {"code": done.exit_code, "said": done.output[-600:]}
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return {**result, "error": "".join(traceback.format_exception(done.exception))[-1500:]}
        if "Traceback" in done.output:
            return {**result, "error": done.output[-1500:]}
        if command[0] == "check" and done.exit_code:
            break
    result["seconds"] = time.process_time() - started
    if result["code"] == 0:
        result["difference"] = compare(folder / "model", folder / "whole")
        compare(folder / "pruned", folder / "pruned")
    return result


def compare(model: Path, exported: Path) -> float | str:
    """Largest difference of logits between two folders as transformers loads them; or why one is not loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))
    differing = []
    for folder in (model, exported):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
            ).eval()
            with torch.no_grad():
                differing.append(loaded(ids, use_cache=False, return_dict=True).logits)
        except Exception as error:
            return f"{folder.name} cannot be loaded: {type(error).__name__}: {error}"[:500]
    return float((differing[0] - differing[1]).abs().max())


def main() -> None:
    from safetensors import safe_open
    from tiny import make_model, make_text

    subject, first, last, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    model, text = make_model(place / "sound"), make_text(place / "text.txt")
    with safe_open(model / "model.safetensors", framework="np") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.offset_keys()}
    signal.signal(signal.SIGPROF, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    os.chdir(place)
    for number in range(first, last):
        source, folder = random.Random(f"{subject} {number}"), place / str(number)
        shutil.copytree(model, folder / "model")
        if subject == "config":
            mutation = mutate_config(folder / "model" / "config.json", source)
            sound = None
        else:
            mutation = mutate_header(folder / "model" / "model.safetensors", source)
            sound = is_sound(folder / "model" / "model.safetensors", shapes)
        try:
            result = run_case(folder, text)
        except BaseException as error:
            result = {"code": None, "error": "".join(traceback.format_exception(error))[-1500:]}
        print(json.dumps({"number": number, "mutation": mutation, "sound": sound, **result}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
