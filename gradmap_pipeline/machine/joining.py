"""How the processes of a run find each other: all come to one place, say what they compute on, and are connected, or told why."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import GradmapError, LaunchError, first_line
from .launch import Place
from .lifeline import Lifeline
from .told_errors import describe_error, rebuild_error

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

SECONDS = "GRADMAP_JOIN_SECONDS"
"""Environment variable: how long the processes wait for each other when they start."""
_SECONDS = 20.0
_MARGIN = 2.0
"""Seconds that the others wait longer than the leading process, which says who is missing."""


def join(place: Place, device: str, end: Callable[[GradmapError], Any]) -> tuple[Store, Lifeline, int]:
    """Wait for all processes. Returns the place where they exchange small values, this process's lifeline, and its GPU's number.

    `end`: as `Lifeline` takes it. Raises the same `LaunchError` in all processes that came, where one does not come, or one has no
    GPU of its own.
    """
    seconds = _read_seconds(os.environ.get(SECONDS, ""))
    deadline = time.monotonic() + seconds
    store = _open_store(place, seconds)
    gpu, seen = _look_at_gpus(device, place.local_rank)
    _put(store, f"here/{place.rank}", {"host": socket.gethostname(), **seen})
    if place.rank == 0:
        with _listen(place.address) as server:
            token = secrets.token_hex(16)
            try:
                check_places(_gather(store, place.size, deadline, seconds))
            except LaunchError as error:
                _refuse(store, place.size, error)
                raise
            _put(store, "verdict", {"port": server.getsockname()[1], "token": token})
            peers = _accept(server, place.size, token, deadline + _MARGIN)
    else:
        verdict = _await_verdict(store, place, seconds, deadline + _MARGIN)
        peers = {0: _call(place, verdict)}
    return store, Lifeline(place.rank, place.size, peers, end), gpu


def check_places(places: Sequence[Mapping[str, Any]]) -> None:
    """Raise `LaunchError` unless all processes compute on a GPU each, or none on a GPU. `places`: `host` and `gpu`, by rank."""
    with_gpu = [rank for rank, place in enumerate(places) if place["gpu"] is not None]
    if with_gpu and len(with_gpu) < len(places):
        rank = next(rank for rank in range(len(places)) if rank not in with_gpu)
        raise LaunchError(
            f"process {rank} on {places[rank]['host']} finds no GPU, process {with_gpu[0]} on {places[with_gpu[0]]['host']} has "
            "one; use --device cpu, or machines that all have GPUs"
        )
    for host in dict.fromkeys(places[rank]["host"] for rank in with_gpu):
        gpus = [places[rank]["gpu"] for rank in with_gpu if places[rank]["host"] == host]
        if len(set(gpus)) < len(gpus):
            found = f"{len(set(gpus))} GPU{'s' if len(set(gpus)) > 1 else ''}"
            raise LaunchError(
                f"{len(gpus)} processes on {host} have {found}, and each needs one of its own; start no more processes on a "
                "machine than it has GPUs, or use --device cpu"
            )


def _read_seconds(text: str) -> float:
    if not text:
        return _SECONDS
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) <= 86400 and len(text) < 10):
        raise LaunchError(f"the environment variable {SECONDS} is {text[:40]!r}, accepted: whole seconds, 1 to 86400")
    return float(text)


def _open_store(place: Place, seconds: float) -> Store:
    """The place where values are exchanged: torchrun holds it, else the leading process."""
    import torch.distributed as dist

    is_held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = place.rank == 0 and not is_held
    if not holds:
        _await_answer(place, seconds)
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            place.address, place.port, place.size, holds, timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=holds
        )
    except (RuntimeError, OSError) as error:
        where = f"{place.address}:{place.port}, which MASTER_ADDR and MASTER_PORT name"
        raise LaunchError(
            f"the processes cannot meet at {where}: {first_line(error)}; name a port that is free on the machine of process 0"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"gradmap/{attempt}", store)  # type: ignore[attr-defined]


def _await_answer(place: Place, seconds: float) -> None:
    """Try until somebody listens at the meeting place; the library's own way to wait says much, and outlasts the limit."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"process 0 of {place.size} has not come: nothing answers at {place.address}:{place.port} within {seconds:g} s "
                    f"({error.strerror or error}); start all processes at once, on machines that reach each other, or have them "
                    f"wait longer with {SECONDS}"
                ) from error
        time.sleep(0.05)


def _look_at_gpus(device: str, local_rank: int) -> tuple[int, dict[str, Any]]:
    """The number of this process's GPU, and what shows whether another process has the same one."""
    if device == "cpu":
        return 0, {"gpu": None}
    import torch

    count = torch.cuda.device_count()
    if not count:
        return 0, {"gpu": None}
    _, _, number = device.partition(":")
    own = (
        int(number) if number.isdigit() else local_rank % count
    )  # where a launcher shows each process its own GPU alone, that is number 0
    return own, {"gpu": str(torch.cuda.get_device_properties(min(own, count - 1)).uuid)}


def _put(store: Store, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def _gather(store: Store, size: int, deadline: float, seconds: float) -> list[dict[str, Any]]:
    """What each process says of itself, by rank. Raises `LaunchError` where one has not come by the deadline."""
    keys = [f"here/{rank}" for rank in range(size)]
    missing = keys
    while missing and time.monotonic() < deadline:
        missing = [key for key in missing if not store.check([key])]
        time.sleep(0.02)
    if missing:
        ranks = [key.removeprefix("here/") for key in missing]
        named = f"process {ranks[0]}" if len(ranks) == 1 else f"processes {', '.join(ranks[:8])}{', ...' if len(ranks) > 8 else ''}"
        raise LaunchError(
            f"{named} of {size} {'has' if len(ranks) == 1 else 'have'} not come within {seconds:g} s; start all processes at once, "
            f"see what each says, or have them wait longer with {SECONDS}"
        )
    return [json.loads(store.get(key)) for key in keys]


def _refuse(store: Store, size: int, error: LaunchError) -> None:
    """Tell those who came, and wait until they know."""
    with suppress(RuntimeError):
        came = [rank for rank in range(1, size) if store.check([f"here/{rank}"])]
        _put(store, "verdict", {"error": describe_error(error)})
        until = time.monotonic() + _MARGIN
        while time.monotonic() < until and not all(store.check([f"told/{rank}"]) for rank in came):
            time.sleep(0.02)


def _await_verdict(store: Store, place: Place, seconds: float, deadline: float) -> dict[str, Any]:
    late = LaunchError(
        f"process 0 of {place.size} has not come, or has ended, within {seconds:g} s; start all processes at once, see what it "
        f"says, or have them wait longer with {SECONDS}"
    )
    try:
        while not store.check(["verdict"]):
            if time.monotonic() > deadline:
                raise late
            time.sleep(0.02)
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
        if "error" in verdict:
            _put(store, f"told/{place.rank}", True)
    except RuntimeError as error:
        raise late from error
    if "error" in verdict:
        failure = rebuild_error(verdict["error"])
        failure.is_agreed = failure.is_told_elsewhere = True
        raise failure
    return verdict


def _listen(address: str) -> socket.socket:
    """A free port, at the address under which the others know this machine, where it is one of the machine's own."""
    try:
        family, _, _, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(target[0]), 0), family=family)
    except OSError:
        return socket.create_server(("", 0))


def _accept(server: socket.socket, size: int, token: str, deadline: float) -> dict[int, socket.socket]:
    """Connections of all other processes, by rank."""
    peers: dict[int, socket.socket] = {}
    while len(peers) < size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            peer, _ = server.accept()
        except OSError as error:
            missing = next(rank for rank in range(1, size) if rank not in peers)
            raise LaunchError(f"process {missing} of {size} came, and ended or cannot reach this machine: {error}") from error
        rank = _read_greeting(peer, token)
        if rank is None:
            peer.close()
        else:
            peers[rank] = peer
    return peers


def _read_greeting(peer: socket.socket, token: str) -> int | None:
    """The rank of a process that has connected; None where it is none of this run."""
    peer.settimeout(_MARGIN)
    with suppress(OSError, ValueError, KeyError, TypeError):
        line = b""
        while not line.endswith(b"\n") and len(line) < 1024 and (more := peer.recv(1)):  # and nothing of what comes after
            line += more
        greeting = json.loads(line)
        if secrets.compare_digest(str(greeting["token"]), token):
            return int(greeting["rank"])
    return None


def _call(place: Place, verdict: Mapping[str, Any]) -> socket.socket:
    try:
        peer = socket.create_connection((place.address, verdict["port"]), timeout=_SECONDS)
        peer.sendall(json.dumps({"rank": place.rank, "token": verdict["token"]}).encode() + b"\n")
    except OSError as error:
        raise LaunchError(f"process 0 at {place.address} cannot be reached on port {verdict['port']}: {error}") from error
    return peer
