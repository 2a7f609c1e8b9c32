"""Which engine takes a request: predicted from learned rates, known load and cached prefixes. No Ray in here."""

from deployments.routing.options import RoutingOptions
from deployments.routing.rates import Rates
from deployments.routing.router import Router
from deployments.routing.types import Choice, Job, Replica

__all__ = ["Choice", "Job", "Rates", "Replica", "Router", "RoutingOptions"]
