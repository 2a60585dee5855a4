"""How many records a second each kind of reader takes, and what that costs it in CPU time."""
