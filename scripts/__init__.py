"""The verbs of the ``meshwright`` command, a file each; ``main`` picks one.

Modules here parse flags before they import jax, so help and bad flags come back at once.
"""

__all__: list[str] = []
