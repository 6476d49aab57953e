"""`python -m forge`, and the `forge` command."""

from forge.cli.main import main

if __name__ == "__main__":
    main()
