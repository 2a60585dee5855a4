"""What a host pays for the agent: the watched service, the agent itself, and everybody else."""
