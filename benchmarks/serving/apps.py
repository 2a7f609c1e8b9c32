"""The applications that are compared, for the ``import_path`` of a Serve configuration."""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from benchmarks.serving.naive import Floor, NaiveEngine, NaiveIngress
from benchmarks.serving.synthetic import SyntheticReplica
from deployments.app import application
from deployments.config import AppConfig


def ours(args: dict[str, Any]) -> Application:
    """Dibit's own application, on engines that only keep time; ``args`` are Dibit's."""
    return application(AppConfig.parse(args), replica=SyntheticReplica)


def naive(args: dict[str, Any]) -> Application:
    """An item of a Serve stream for each token of each request; ``args``: ``model``, a folder."""
    return NaiveIngress.bind(NaiveEngine.bind(args["model"]))


def floor(args: dict[str, Any]) -> Application:
    """An ingress that generates by itself; ``args``: ``model``, a folder."""
    return Floor.bind(args["model"])
