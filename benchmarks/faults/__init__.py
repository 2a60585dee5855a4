"""Does the agent say why? Faults injected for real, each with a known cause and size: `python -m benchmarks.faults`."""
