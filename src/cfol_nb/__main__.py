"""The console script. Whatever goes wrong in a command is one sentence, and so are Ctrl-C and SIGTERM, from the first
moment on: libraries are imported only once both are heard."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import NoReturn

LONGEST = 2000  # characters of a sentence


def _said(stop: object) -> str:
    return f"\n{stop or 'stopped'}; what is finished is stored, and the same command goes on from there\n"


def _leave(text: str, number: int) -> NoReturn:
    """End at once. Workers and kernels follow, and what they store is whole or not there."""
    with contextlib.suppress(OSError):
        os.write(2, _said(text).encode())
    os._exit(128 + number)


def _listen() -> None:
    """The first SIGINT or SIGTERM is a KeyboardInterrupt, so that workers and kernels can be stopped first; one that
    comes a second later ends the process. While a module is imported the first does, too: an import may swallow it."""
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        text = f"stopped by {signal.Signals(number).name}"
        if first and time.monotonic() - first[0] > 1:
            _leave(text, number)
        if not first:
            first.append(time.monotonic())
            while frame:
                if frame.f_code.co_filename.startswith("<frozen importlib"):
                    _leave(text, number)
                frame = frame.f_back
            raise KeyboardInterrupt(text)

    def unraisable(ignored) -> None:  # in a destructor, where nobody would hear of it
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            _leave(str(ignored.exc_value), _number(ignored.exc_value))
        sys.__unraisablehook__(ignored)

    sys.unraisablehook = unraisable
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background, or under nohup
            signal.signal(number, stop)


def _number(stop: object) -> int:
    return signal.SIGTERM if "SIGTERM" in str(stop) else signal.SIGINT


def _log(error: BaseException) -> str:
    """Where the traceback now lies: in runs/logs/, or in the system's temporary folder; empty if nowhere."""
    import shlex
    import tempfile
    import traceback

    from cfol_nb.files import runs_dir

    text = f"{shlex.join(sys.argv)}\n\n{''.join(traceback.format_exception(error))}"
    for place in (lambda: runs_dir() / "logs", tempfile.gettempdir):
        try:
            os.makedirs(folder := place(), exist_ok=True)
            file, path = tempfile.mkstemp(".log", time.strftime("cfol-nb-%Y%m%d-%H%M%S-"), folder)
        except (OSError, RuntimeError):
            continue
        try:
            with open(file, "w", errors="backslashreplace") as f:
                f.write(text)
            return path
        except OSError:
            os.unlink(path)
    return ""


def _told(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and the sentence: 2 for what is refused before work, with the refusal's own words."""
    import re
    import shlex
    import textwrap
    import traceback
    from pathlib import Path

    text, code = str(error), 2 if isinstance(error, ValueError | FileNotFoundError) else 1
    frames = traceback.extract_tb(error.__traceback__)
    if output := frames[-1:] and frames[-1].name == "echo" and isinstance(error, OSError):  # of typer
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left cannot be written at the end, either
        if isinstance(error, BrokenPipeError):
            return 1, ""
    # raised by this package, and so in words for the user
    own = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    own = own and (frames[-1].line or "").startswith("raise ")
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if not own:
            paths = [v for f, _ in traceback.walk_tb(error.__traceback__) for v in f.f_locals.values()]
            paths = [str(v) for v in paths if isinstance(v, Path)]
            where = "the output" if output else error.filename or "".join(paths[-1:])
            own, text = bool(where), f"{where}: {text}"
    if not own:
        text = f"{type(error).__name__}: {text or 'no reason given'}, in `{shlex.join(['cfol-nb', *sys.argv[1:]])}`"
    text = re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", text.strip()))
    text = f"error: {textwrap.shorten(text, LONGEST, placeholder=' ...')}"
    if not (own and code == 2) and (log := _log(error)):
        text += f" (traceback: {log})"
    return code, text


def main() -> None:
    """Run the command line: exit codes: 2 for refused input, 1 for a failure, 130 after Ctrl-C, 143 after SIGTERM."""
    _listen()
    code, said = 0, ""
    try:
        try:
            import typer

            from cfol_nb.cli import app

            command = typer.main.get_command(app)
            with command.make_context("cfol-nb", sys.argv[1:]) as context:
                command.invoke(context)
        except KeyboardInterrupt as stop:
            code, said = 128 + _number(stop), _said(stop)
        except typer.Exit as end:
            code = end.exit_code
        except Exception as error:
            if not hasattr(error, "format_message"):
                code, said = _told(error)
            elif (code := error.exit_code) and len(sys.argv) > 1:  # how the command is called
                path = error.ctx.command_path if getattr(error, "ctx", None) else "cfol-nb"
                said = f"error: {' '.join(error.format_message().split()).rstrip('.')} (see `{path} --help`)"
            else:
                error.show()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)  # the rest takes no time and needs no word
    if said:
        with contextlib.suppress(OSError):
            print(said, file=sys.stderr, end="" if said.endswith("\n") else "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
