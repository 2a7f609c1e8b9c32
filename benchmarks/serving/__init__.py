"""The serving path alone: an engine that only keeps time, behind the real ingress, client, router and token stream.

``python -m benchmarks.serving --help``; what is measured is said in :mod:`benchmarks.serving.measures`.
"""
