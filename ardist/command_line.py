"""What every command line of the project shares: one clear message, the right exit code, a traceback on request."""

from __future__ import annotations

import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from ardist import log
from ardist.errors import ArdistError, HardwareError

INTERRUPTED = 130

_SHOWN = 200
"""Characters of a text that cannot be written, around where it cannot."""


def run(app: typer.Typer, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a typer application and return its exit code.

    ``--debug`` anywhere on the line shows tracebacks and debug messages. An `ArdistError` is printed as one
    message and gives its own exit code; a usage error gives 2; a file that cannot be used gives 4, and so does a name
    that the locale's encoding has no bytes for; an unforeseen error gives 1 and asks for --debug.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any name can be shown, whatever the locale
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    log.configure(level=logging.DEBUG if debug else logging.INFO)
    try:
        app(words, prog_name=program)  # reports usage errors itself and always ends in SystemExit
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ArdistError as error:
        _show(error, f"{program}: {error}", debug)
        return error.exit_code
    except OSError as error:
        if error.filename is None:
            return _unexpected(program, error, debug)
        _show(error, f"{program}: {os.fsdecode(error.filename)!r}: {error.strerror or error}", debug)
        return HardwareError.exit_code
    except UnicodeEncodeError as error:
        _show(error, f"{program}: {_unnameable(error)}", debug)
        return HardwareError.exit_code
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of defence, reported and turned into exit code 1
        return _unexpected(program, error, debug)


def _unnameable(error: UnicodeEncodeError) -> str:
    """What to do about text that an encoding has no bytes for: under a locale other than UTF-8, about the locale."""
    encoding = sys.getfilesystemencoding()
    low = max(0, error.start - _SHOWN // 2)
    high = low + _SHOWN
    shown = "…" * (low > 0) + repr(error.object[low:high]) + "…" * (high < len(error.object))
    if encoding == "utf-8":
        if "\udc80" <= error.object[error.start] <= "\udcff":  # what Python makes of a byte that is none of UTF-8
            return f"{shown} is no valid UTF-8; where it names a file, rename that file"
        return f"{shown} holds half a surrogate pair, which is no valid UTF-8; legal: text"
    return (
        f"{shown} cannot be named or written where names of files are encoded in {encoding}; "
        "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    )


def _unexpected(program: str, error: Exception, debug: bool) -> int:
    message = f"{program}: unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
    _show(error, message, debug)
    return 1


def _show(error: BaseException, message: str, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    print(message, file=sys.stderr)
