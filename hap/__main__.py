"""`python -m hap`."""

from hap.harness.cli import main

if __name__ == "__main__":
    main()
