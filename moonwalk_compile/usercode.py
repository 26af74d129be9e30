"""Telling a user's mistake from a bug of the compiler: an exception that passed through the user's own lines."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MoonwalkError, UsageError
from .replay import try_out

# Packages whose frames are never the user's: torch calls the user's code, the compiler calls the others.
_LIBRARIES = ("torch", "networkx", "numpy", "sympy", "tabulate", "matplotlib")
_OWN_FOLDER = Path(__file__).resolve().parent


@contextmanager
def reporting_user_code(doing: str, place: str | None = None) -> Iterator[None]:
    """Turn exceptions that passed through the user's code into UsageErrors; let others, and our own, through.

    Args:
        doing: what was going on, for the title: "importing model.py".
        place: where nothing but the user's code runs, its name; then every exception is the user's.
    """
    try:
        yield
    except MoonwalkError:
        raise
    except SystemExit as error:
        what = f"SystemExit: {error.code} while {doing}"
        todo = 'keep the script\'s own work under `if __name__ == "__main__":`'
        raise UsageError("The model's code exits", what, todo, where=user_line(error) or place) from error
    except Exception as error:
        where = user_line(error) or place or plain_run(error)
        if where is None:
            raise
        what = f"{type(error).__name__}: {_first_paragraph(error)}"
        raise UsageError(f"The model's code failed while {doing}", what, "mend it there", where=where) from error


def user_line(error: BaseException) -> str | None:
    """ "path/model.py:12 in forward": the innermost of the user's own lines that `error` passed through."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        frames = [frame for frame in _frames(cause) if _is_users(frame.filename)]
        if frames:
            return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}"
        cause = cause.__cause__ or cause.__context__
    return None


def plain_run(error: BaseException) -> str | None:
    """Where nothing but the model has run, as it is; a model of torch's own modules has no lines of the user's."""
    code = try_out.__code__
    inside = any((frame.filename, frame.name) == (code.co_filename, code.co_name) for frame in _frames(error))
    return "the model's forward pass, run as it is" if inside else None


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Frames, outermost first. Dynamo runs no frames of the model: it leaves those it read in `real_stack`."""
    frames = list(traceback.extract_tb(error.__traceback__))
    frames += getattr(error, "real_stack", None) or ()
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(traceback.FrameSummary(error.filename, error.lineno or 0, "<module>", lookup_line=False))
    return frames


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):  # frozen importlib, generated code
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(folder) for folder in _LIBRARY_FOLDERS) and not _in_standard_library(path)


def _in_standard_library(path: Path) -> bool:
    inside = path.is_relative_to(Path(sysconfig.get_path("stdlib")).resolve())
    return inside and not {"site-packages", "dist-packages"}.intersection(path.parts)


def _library_folders() -> tuple[Path, ...]:
    sites = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    own = (_OWN_FOLDER, (_OWN_FOLDER / "passes").resolve())
    return (*own, *(site / name for site in sites for name in _LIBRARIES))


_LIBRARY_FOLDERS = _library_folders()


def _first_paragraph(error: BaseException) -> str:
    """Dynamo's messages go on for pages; their first paragraph says what was wrong."""
    return " ".join(str(error).split("\n\n", 1)[0].split()) or "(no message)"
