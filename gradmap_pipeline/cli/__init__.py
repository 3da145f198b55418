"""The process of the `gradmap` command: signals, streams and the last line of defence around `commands`."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":
        from .commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Entry point of the `gradmap` command."""
    from .ending import finish, tell_end, tell_plainly, watch_signals

    code: Any = 0
    try:
        watch_signals()
        code = _run()
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except BaseException as error:
        try:
            code = tell_end(error)
        except BaseException as failure:  # so little memory that not even the words can be imported
            code = tell_plainly(failure)
    finish(code)


def _run() -> int:
    """Exit code of the command that the arguments name."""
    import sys

    from ..machine.streams import guard_streams
    from ..machine.supervision import address_limit, supervise

    guard_streams()
    if address_limit() is not None:
        ended = supervise()
        if ended is not None:
            code, message = ended
            if message:
                print(f"error: {message}", file=sys.stderr)
            return code
    from .commands import run_command

    code = run_command()
    sys.stdout.flush()
    return code
