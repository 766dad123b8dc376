"""`python -m kwflow`: the same as the `kwflow` script."""

from kwflow.cli import main

if __name__ == "__main__":
    main()
