"""Run: ``python -m bot COMMAND``, which is ``kibitz COMMAND``."""

from bot.cli.main import main

if __name__ == "__main__":
    main()
