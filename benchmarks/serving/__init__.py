"""The serving path alone: an engine that only keeps time, behind the real ingress, client, router and token stream.

``python -m benchmarks.serving --help``; ``docs`` of the measures are in :mod:`benchmarks.serving.measures`.
"""
