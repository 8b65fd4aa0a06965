"""The one error of compiling for hardware that is not here: the compiler gave no program.

A separate file because the child process, the parent that reads its answer and the code that
lowers a user's step all raise it. It carries what the compiler said, so that a command can keep
that in a file and show only the sentence; the other errors of a compile (a mesh that does not
fit, wheels that are missing) have their own classes in `meshwright.sharding.errors`.
"""

from __future__ import annotations

from typing import Literal

from meshwright.sharding.errors import MeshwrightError

__all__ = ["CompileError", "Failure"]

Failure = Literal["start", "signal", "timeout", "exception", "silence", "refused"]
"""How a compile ended without a program: the child could not start, was killed by a signal, took
too long, raised, ended without an answer, or the compiler refused the program itself."""


class CompileError(MeshwrightError):
    """A compile for absent hardware came to nothing; exit code 2.

    Attributes:
        failure: how it ended.
        chatter: everything the child wrote to its stdout and stderr, and its traceback.
    """

    def __init__(
        self,
        what: str,
        *,
        failure: Failure = "exception",
        where: str = "",
        why: str = "",
        fix: str = "",
        chatter: str = "",
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.failure: Failure = failure
        self.chatter = chatter
