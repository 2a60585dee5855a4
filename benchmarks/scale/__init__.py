"""What the agent costs and what it loses as the number of concurrent streams grows."""
