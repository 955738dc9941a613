"""`python -m stlm` is the `stlm` command, for launchers that start modules."""

from stlm.cli import main

if __name__ == "__main__":
    main()
