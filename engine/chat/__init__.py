"""Conversations: the template that writes them as one string, and tools for models whose template knows none."""
