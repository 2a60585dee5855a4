"""The models that the service offers."""

from __future__ import annotations

from typing import Final

from examples.roleplay.model import ModelShape

# Sized for two cores and, with everything else, less than 300 MB: see README.md for what that gives.
UNDERSTUDY: Final = ModelShape(
    "understudy", layers=6, heads=6, kv_heads=2, head_width=32, context=4096, kv_tokens=12288
)
HEADLINER: Final = ModelShape("headliner", layers=8, heads=12, kv_heads=2, head_width=32, context=4096, kv_tokens=10240)

SHAPES: Final = {shape.name: shape for shape in (UNDERSTUDY, HEADLINER)}
