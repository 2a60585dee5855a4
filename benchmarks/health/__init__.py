"""How soon the agent finds that a service is not well, and how quiet it is while it is."""
