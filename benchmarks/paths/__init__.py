"""What critical paths cost."""
