"""How far the agent's figures are from those of a client with its own clock."""
