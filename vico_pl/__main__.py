"""`python -m vico_pl` is the `vico` command."""

from vico_pl.cli import main

if __name__ == "__main__":
    main()
