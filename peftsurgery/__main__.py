"""`python -m peftsurgery`."""

from peftsurgery.cli import main

if __name__ == "__main__":
    main()
