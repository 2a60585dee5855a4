"""Lets `python -m examples.roleplay` run the commands."""

from examples.roleplay.cli import main

if __name__ == "__main__":
    main(prog_name="python -m examples.roleplay")
