"""Routers beside each other, in a simulation of engines by discrete events."""
