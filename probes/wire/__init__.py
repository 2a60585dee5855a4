"""Decoders from the bytes of one TCP direction to what the SLIs need.

They are pure and incremental. They trust nothing: whatever the bytes are, no decoder raises, and each holds a
stated number of bytes at most. The same bytes give the same result however they are split into feeds.
"""
