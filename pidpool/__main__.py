"""``python -m pidpool``: the same as the command ``pidpool``."""

from pidpool.cli import main

if __name__ == "__main__":
    main()
