"""What each subcommand of ``dibit`` does, and in ``arguments`` what it takes.

All but ``arguments`` and ``keys`` need heavy libraries, and are imported only when they run.
"""
