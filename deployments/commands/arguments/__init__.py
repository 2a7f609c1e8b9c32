"""What each ``dibit`` command takes: one file a command, named like the one that carries it out.

That one is imported when its command runs, and nothing heavy before, so that ``--help`` answers at once.
"""
