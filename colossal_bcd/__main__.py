"""`python -m colossal_bcd` is the command `colossal-bcd`."""

from colossal_bcd.cli import main

if __name__ == "__main__":
    main()
