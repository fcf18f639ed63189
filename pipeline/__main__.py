"""Where the `pipeline` command starts: Ctrl-C in the time that its imports take ends it as it does later."""

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
