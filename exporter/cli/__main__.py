"""Runs the command line as `python -m exporter.cli`."""

from __future__ import annotations

from exporter.cli import main

main(prog_name="footlight")
