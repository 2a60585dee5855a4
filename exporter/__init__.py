"""Everything that makes sense of the data and hands it out: SLIs, exposition and commands."""

from __future__ import annotations

from typing import Final

VERSION: Final = "0.1.0"
"""As pyproject.toml says it: to ask the installed distribution takes 3 MiB of modules, in each process of the agent."""
