"""How many replicas each pool should have: a pure function, and the policies through which Serve asks it.

Serve carries the module of a policy to its controller by value (cloudpickle), submodules included, and what a policy
imports beyond it has to be installed there. So this package imports nothing else of the project.
"""

from deployments.autoscaling.planning import plan
from deployments.autoscaling.policies import ApplicationPolicy, PoolPolicy
from deployments.autoscaling.state import Memory, PoolMemory, PoolOptions, PoolState, ReplicaStats

APPLICATION_POLICY = "deployments.autoscaling:ApplicationPolicy"
"""The ``policy_function`` of an application's ``autoscaling_policy``."""

__all__ = [
    "APPLICATION_POLICY",
    "ApplicationPolicy",
    "Memory",
    "PoolMemory",
    "PoolOptions",
    "PoolPolicy",
    "PoolState",
    "ReplicaStats",
    "plan",
]
