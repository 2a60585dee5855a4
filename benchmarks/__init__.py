"""What Footlight costs and how true it is: each benchmark is one command, `python -m benchmarks.<name>`."""
