"""Entry point of the `pipeline` command: Ctrl-C during its imports ends it as it does later."""

import sys


def main() -> None:
    """Import the command and run it."""
    try:
        from pipeline.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
