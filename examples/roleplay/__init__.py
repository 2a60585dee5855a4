"""A small role-play service: real transformers with random weights behind an OpenAI-compatible API."""
