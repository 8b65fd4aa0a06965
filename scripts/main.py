"""The `meshwright` command: finds the verb, runs it, and turns errors into exit codes.

A mistake of the user's is a `MeshwrightError`: its text goes to stderr and its exit code is the
program's, with no traceback. Any other exception is a bug of ours and keeps its traceback. A
verb's module is imported when the verb is asked for, and jax when it runs, so that help and
wrong flags are answered at once.

Exit codes: 0 done, 1 a plan that does not fit or breaks its budget, 2 bad input, 3 stopped by
non-finite loss, 4 checkpoint unusable, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from meshwright.sharding.errors import (
    ConfigError,
    MeshwrightError,
    MissingExtraError,
    did_you_mean,
)

__all__ = ["EXTRAS", "VERBS", "main"]

VERBS = {
    "train": ("train", "train a decoder language model, on one device or many"),
    "explain": ("explain", "show how a model's parameters would be laid out on a mesh"),
    "plan": ("plan", "say what a run would hold, move and take on hardware that is not here"),
    "calibrate": ("calibrate", "measure this machine's device for better plans"),
    "tokenize": ("tokenizer", "train a byte-pair tokenizer on a text"),
    "bench": ("bench", "measure this installation and print the numbers"),
}
"""Each verb with its module in this folder and what it does, in one line."""

EXTRAS = {
    "array_record": "train",
    "grain": "train",
    "tensorboardX": "train",
    "tokenizers": "train",
}
"""Packages that are not dependencies of the core, with the extra that brings them."""

_HELP = """\
usage: meshwright VERB [FLAGS]

{verbs}

`meshwright VERB --help` lists the flags of a verb; `meshwright --version` prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code.

    Args:
        argv: the words after the program's name; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()  # a closed pipe is noticed here, not in the interpreter's exit
        return code
    except MeshwrightError as error:
        return _report(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _report(_missing_extra(words[0], package))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone (meshwright --help | head): no more to say, and nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if first == "--version":
        print(f"meshwright {_version()}")
        return 0
    if first not in VERBS:
        if not first:
            print(_help(), end="", file=sys.stderr)
            return 2
        raise ConfigError(f"there is no verb `{first}`", fix=did_you_mean(first, VERBS))
    verb: Callable[[Sequence[str]], int] = import_module(
        f"meshwright.scripts.{VERBS[first][0]}"
    ).main
    try:
        return verb(words[1:])
    except SystemExit as end:  # the help was printed
        return end.code if isinstance(end.code, int) else 0


def _help() -> str:
    lines = [f"  {verb:<10} {about}" for verb, (_, about) in VERBS.items()]
    return _HELP.format(verbs="\n".join(lines))


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meshwright")
    except PackageNotFoundError:
        return "(not installed)"


def _missing_extra(verb: str, package: str) -> MissingExtraError:
    extra = EXTRAS[package]
    return MissingExtraError(
        f"`meshwright {verb}` needs the package `{package}`",
        why=f"it comes with the extra `{extra}`, which is not installed",
        fix=f"pip install 'meshwright[{extra}]'",
    )


def _report(error: MeshwrightError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
