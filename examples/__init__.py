"""Services that Footlight can watch, small enough to run beside it."""
