"""`meshwright tokenize`: train a byte-pair tokenizer for `--data.tokenizer`.

``python scripts/tokenizer.py PATH FLAGS`` is the same program. The file is not named after the
verb, because a `tokenize.py` in the folder of a script hides the standard library's module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from meshwright.scripts.flags import FlagReader
from meshwright.sharding.errors import ConfigError

__all__ = ["TokenizeFlags", "main"]

_ABOUT = """\
Train a byte-level byte-pair tokenizer on a text. Use it with
`meshwright train --data.path PATH --data.tokenizer FILE --model.vocab-size INT`."""

_BYTES = 256


@dataclass(frozen=True)
class TokenizeFlags:
    """What is trained on, how large, and where it goes."""

    path: str | None = None
    """A text file, a .jsonl file or a folder of them."""
    vocab_size: int = 4096
    """Tokens, the 256 bytes included."""
    out: str = "tokenizer.json"
    """File to write."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                "there is no text to train the tokenizer on",
                fix="write meshwright tokenize PATH",
            )
        if self.vocab_size <= _BYTES:
            raise ConfigError(
                f"cannot use --vocab-size {self.vocab_size}",
                why=f"the {_BYTES} bytes are tokens already and leave no room for pairs",
                fix=f"use {_BYTES + 1} or more, such as 4096",
            )
        if not self.out:
            raise ConfigError("cannot use --out ''", why="it is empty", fix="give a file name")


def main(argv: Sequence[str]) -> int:
    """Run the verb on the words after it and return the exit code."""
    reader = FlagReader(TokenizeFlags, "meshwright tokenize", _ABOUT, positional="path")
    defaults = {field.name: field.default for field in fields(TokenizeFlags)}
    flags = TokenizeFlags(**reader.read(argv, defaults))
    from meshwright.train.tokenizer import train_tokenizer

    train_tokenizer(flags.path, flags.vocab_size, flags.out)
    return 0


if __name__ == "__main__":
    from meshwright.scripts.main import main as run_verb

    sys.exit(run_verb(["tokenize", *sys.argv[1:]]))
