"""`python -m hwsearch`: the command line, where no console script is installed."""

from hwsearch.cli import main

if __name__ == "__main__":
    main()
