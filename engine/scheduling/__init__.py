"""Which tokens of which requests are computed next, and where their keys and values live."""
