"""Train or evaluate; see fambav/cli.py."""

from fambav.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
