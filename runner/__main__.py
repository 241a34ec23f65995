"""`python -m runner …`, and the console script."""

from __future__ import annotations

import gc


def main() -> None:
    """The command line, with garbage left where it is until much has gathered.

    Starting makes 75,000 objects that stay. To look for garbage among them, dozens of times at Python's own threshold,
    takes up to a tenth of the time of `plan`: so it is set before anything is imported.
    """
    gc.set_threshold(250_000)
    from runner.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()
