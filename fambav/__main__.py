"""`python -m fambav` is the console script `fambav`."""

from fambav.cli import console

if __name__ == "__main__":
    raise SystemExit(console())
