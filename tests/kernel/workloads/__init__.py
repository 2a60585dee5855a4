"""Small programs that do to TCP sockets what a test tells them, and the texts they exchange."""
