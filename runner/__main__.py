"""`python -m runner …`, and the console script."""

from __future__ import annotations

import atexit
import gc


def main() -> None:
    """The command line, with garbage left where it is until much has gathered, and at exit for good.

    Starting makes 100,000 objects that stay. `plan` looked for garbage among them 43 times before the threshold was set
    here, ahead of every import. The last look, which Python takes as it ends, was a fifth of what a plan takes. Its
    hook is registered first, so it runs after all others.
    """
    gc.set_threshold(250_000)
    atexit.register(gc.freeze)
    from runner.cli.main import main as command_line

    command_line()


if __name__ == "__main__":
    main()
