"""What may be said about routing in ``serve_config.yaml``."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RoutingOptions(BaseModel):
    """The service level to route for, when to turn requests away, and how fast to learn.

    Goodput, the number that routing maximizes, counts requests whose first token comes within ``slo_ttft_s`` and whose
    later ones come every ``slo_tpot_s`` on average (DistServe, Zhong et al., OSDI 2024).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slo_ttft_s: float = Field(default=2.0, gt=0)
    """Seconds until the first token that count as good."""
    slo_tpot_s: float = Field(default=0.05, gt=0)
    """Seconds between later tokens, averaged over a request, that count as good."""
    admission: bool = False
    """Whether requests are turned away (429) while no replica could serve them within the limits below. Without it they
    wait, and under overload all of them miss the service level; with it, those that are let in keep it."""
    max_ttft_s: float = Field(default=1.5, gt=0)
    """Predicted seconds until the first token beyond which a request is turned away, unless its prompt takes so long
    even on an idle replica. Short of ``slo_ttft_s``: under overload every prediction is at this limit, and half of what
    is predicted comes a little later."""
    max_tpot_s: float = Field(default=0.05, gt=0)
    """Predicted seconds between later tokens beyond which a request is turned away, unless they take so long even on an
    idle replica."""
    max_cost: float = Field(default=2.5, gt=0)
    """Requests that one may be predicted to make miss the service level, itself among them; it is turned away where it
    would be more. Over 1, as predictions for those already there err to the careful side."""
    forget_after_s: float = Field(default=60.0, gt=0)
    """Seconds of an engine's work after which an observation of its speed counts 1/e as much as a new one."""
