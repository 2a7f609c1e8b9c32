"""Kills under load: processes are lost at random while clients stream, and no client may notice.

``python -m benchmarks.chaos --help`` says what is done and what must hold.
"""
