"""How soon somebody is told, by the agent itself and through Prometheus, and how often."""
