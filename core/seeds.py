"""Random numbers that depend only on what they are for: the same in every run and on every rank."""

import hashlib


def seed_from(*what):
    """A 31-bit seed from anything that prints."""
    return int.from_bytes(_digest(what)[:4], "big") >> 1


def uniform_from(*what):
    """A number in [0, 1) from anything that prints."""
    return int.from_bytes(_digest(what)[:8], "big") / 2**64


def _digest(what):
    return hashlib.sha256(repr(what).encode()).digest()
