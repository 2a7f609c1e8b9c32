"""What the ``args`` of ``serve_config.yaml`` may say, checked once before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.access.config import AccessConfig
from deployments.identity import ModelIdentity
from deployments.mistakes import mistakes
from deployments.observability.config import ObservabilityConfig
from deployments.routing import RoutingOptions
from engine.checkpoint.hub import is_repository, resolve_model
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
NAME_PATTERN = r"^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplicaRange(_Section):
    """Bounds between which Serve scales a deployment; ``replicas: 2`` means exactly two.

    With ``min: 0`` the last replica goes when nothing has been asked for a while, and the next request brings one back.
    """

    min: int = Field(default=1, ge=0)
    max: int = Field(ge=1)
    initial: int | None = Field(default=None, ge=0)
    """How many to start with; None is ``min``."""

    @model_validator(mode="after")
    def _check_order(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max})")
        if self.initial is not None and not self.min <= self.initial <= self.max:
            raise ValueError(f"initial ({self.initial}) is not within min ({self.min}) and max ({self.max})")
        return self


def _exactly(replicas: Any) -> Any:
    return {"min": replicas, "max": replicas} if isinstance(replicas, int) else replicas


Replicas = Annotated[ReplicaRange, BeforeValidator(_exactly)]


class AutoscalingOptions(_Section):
    """How a pool whose ``replicas`` have room between min and max is scaled."""

    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """Requests on each replica that Serve's own policy aims at; None is half of ``max_num_seqs``."""
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)
    downscale_to_zero_delay_s: float | None = Field(default=None, ge=0)
    """Before the last replica goes; None is ``downscale_delay_s``."""
    look_back_period_s: float = Field(default=30.0, gt=0)
    metrics_interval_s: float = Field(default=10.0, gt=0)
    cost: float | None = Field(default=None, gt=0)
    """Of a replica, in any unit: the pool where it is least grows first. None is the number of its accelerators."""
    target_utilization: float = Field(default=0.7, gt=0, le=1)
    """Share of a replica's time that requests may take, if the service level does not bound it lower."""
    start_s: float = Field(default=60.0, gt=0)
    """How long a replica takes to start, a new node included, until that has been seen."""
    policy: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """``module:function`` of another policy than ``deployments.autoscaling``, called with Serve's AutoscalingContext;
    ``ray.serve.autoscaling_policy:default_autoscaling_policy`` is Serve's own."""
    policy_kwargs: dict[str, Any] = Field(default_factory=dict)


class PoolConfig(_Section):
    """Replicas of one kind: the same accelerator, the same number of tensor-parallel ranks, the same weights.

    Without ``accelerator_type`` the ranks run on the CPU. ``num_cpus`` is what Ray sets aside for each rank (its
    threads are ``engine.num_threads``); None means 0.25 on a CPU pool, so that several ranks fit a laptop, and 1 next
    to an accelerator.
    """

    name: str = Field(default="cpu", pattern=NAME_PATTERN)
    accelerator_type: str | None = Field(default=None, min_length=1)
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that each rank's node must have, such as ``{"zone": "a"}``."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of each rank, besides its accelerator."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    across_nodes: bool | None = None
    """Whether the ranks of one engine may be on several nodes. None: only where no node has room for all of them."""
    model: str | None = Field(default=None, min_length=1)
    """Another checkpoint of the same model, such as one quantized otherwise; None is the application's."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Engine options of this pool, over those of the application."""
    replicas: Replicas = ReplicaRange(min=1, max=1)
    autoscaling: AutoscalingOptions = Field(default_factory=AutoscalingOptions)
    num_cpus: float | None = Field(default=None, gt=0)

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: dict[str, Any]) -> dict[str, Any]:
        return _engine_options(engine)

    @field_validator("resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU") or amount <= 0:
                raise ValueError(
                    f"{name}: {amount:g} is not a custom resource; num_cpus and accelerator_type set those"
                )
        return resources

    @property
    def cost(self) -> float:
        """Of a replica, see :class:`AutoscalingOptions`."""
        return self.tensor_parallel_size if self.autoscaling.cost is None else self.autoscaling.cost

    @property
    def cpus_per_rank(self) -> float:
        """CPUs that Ray sets aside for each rank."""
        return self.num_cpus if self.num_cpus is not None else (1.0 if self.accelerator_type else 0.25)


class IngressConfig(_Section):
    """The HTTP side: how many processes take requests, and how many requests Serve lets each hold.

    What is admitted is the business of the ingress and of the engines' schedulers, so Serve's limit is out of the way.
    """

    replicas: Replicas = ReplicaRange(min=1, max=1)
    max_ongoing_requests: int = Field(default=100_000, ge=1)
    num_cpus: float = Field(default=0.1, ge=0)
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that each process's node must have, such as those of nodes without accelerators, which come and
    go less often."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of each process."""


class HealthConfig(_Section):
    """When Serve replaces a replica. A dead rank is noticed at once; these are for one that lives and does nothing."""

    check_period_s: float = Field(default=2.0, gt=0)
    check_timeout_s: float = Field(default=30.0, gt=0)
    stalled_after_s: float = Field(default=60.0, gt=0)
    """Seconds without a finished step or a heartbeat of an engine until its requests go on elsewhere and it is
    replaced."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that a replica being stopped may take to finish its requests; afterwards they go on elsewhere."""


class FailoverConfig(_Section):
    """What becomes of requests when engines are lost, or when there are none."""

    max_losses: int = Field(default=3, ge=0)
    """Engines that a request may lose in a row without a new token from any, before it is given up: one that itself
    brings engines down must not take all of them, one after the other."""
    max_losses_in_all: int = Field(default=12, ge=0)
    """Engines that a request may lose, new tokens or not."""
    max_held: int = Field(default=1000, ge=0)
    """Requests that each ingress process holds while no engine is up; more are turned away."""
    hold_s: float = Field(default=300.0, ge=0)
    """Seconds that a request is held."""


class AppConfig(_Section):
    """All of ``args``. :meth:`parse` reads it; ``model`` is an absolute path or a repository afterwards."""

    model: str = Field(min_length=1)
    served_model_name: str = Field(default="", validate_default=True)
    engine: dict[str, Any] = Field(default_factory=dict)
    pools: list[PoolConfig] = Field(default_factory=lambda: [PoolConfig()], min_length=1)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    failover: FailoverConfig = Field(default_factory=FailoverConfig)
    routing: RoutingOptions = Field(default_factory=RoutingOptions)
    access: AccessConfig = Field(default_factory=AccessConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)
    tool_call_parser: str | None = Field(default=None, min_length=1)
    """How the model writes tool calls, where its chat template doesn't tell: see ``deployments.openai.calls``."""

    @field_validator("served_model_name")
    @classmethod
    def _default_name(cls, name: str, info: Any) -> str:
        return name or Path(info.data.get("model", "")).name

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: dict[str, Any]) -> dict[str, Any]:
        return _engine_options(engine)

    @field_validator("pools")
    @classmethod
    def _check_names(cls, pools: list[PoolConfig]) -> list[PoolConfig]:
        names = [pool.name for pool in pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pool names must differ; found {', '.join(names)}")
        return pools

    @classmethod
    def parse(cls, args: dict[str, Any]) -> AppConfig:
        """Check the ``args`` of an application.

        A relative ``model`` is looked up in the working directory, then beside the ``deployments`` package (the root
        of a checkout), so that the embedded default works from anywhere. What is no folder may be the name of a
        repository; it is kept as it is, for every node fetches it for itself.

        Raises:
            ConfigError: an option is missing, unknown or wrong (the message names it), there is no such model, or pools
                would serve different models.
            CheckpointError: the repository can't be fetched.
            UnsupportedError: an architecture that Dibit does not have.
        """
        try:
            config = cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(f"serve_config.yaml, args: {mistakes(error, cls)}") from None
        place = _model_place(config.model)
        pools = [
            pool if pool.model is None else pool.model_copy(update={"model": _model_place(pool.model)})
            for pool in config.pools
        ]
        config = config.model_copy(update={"model": place, "pools": pools})
        config._check_pools()
        return config

    def model_of(self, pool: PoolConfig) -> str:
        """Folder or repository of a pool's checkpoint."""
        return pool.model or self.model

    def engine_config(self, pool: PoolConfig) -> EngineConfig:
        """The engine options of one pool; a pool without accelerators runs on the CPU unless ``device`` is set."""
        options = {**self.engine, **pool.engine}
        if pool.accelerator_type is None:
            options.setdefault("device", "cpu")
        return EngineConfig(model=self.model_of(pool), tensor_parallel_size=pool.tensor_parallel_size, **options)

    def max_model_len(self, pool: PoolConfig) -> int:
        """Tokens that a sequence may have in a pool, by its options and its model; its memory may hold fewer."""
        model = ModelConfig.from_folder(resolve_model(self.model_of(pool), weights=False))
        asked = self.engine_config(pool).max_model_len
        return min(asked or model.max_position_embeddings, model.max_position_embeddings)

    def _check_pools(self) -> None:
        for pool in self.pools:
            model = ModelConfig.from_folder(resolve_model(self.model_of(pool), weights=False))
            if model.num_attention_heads % pool.tensor_parallel_size:
                raise ConfigError(
                    f"pools.{pool.name}.tensor_parallel_size: {pool.tensor_parallel_size} does not divide the model's "
                    f"{model.num_attention_heads} attention heads"
                )
        places = {self.model_of(pool): pool.name for pool in reversed(self.pools)}
        if len(places) == 1:
            return
        (first, first_pool), *others = reversed(places.items())
        identity = ModelIdentity.of_folder(resolve_model(first, weights=False))
        for place, pool_name in others:
            found = ModelIdentity.of_folder(resolve_model(place, weights=False)).differences(identity)
            if found:
                raise ConfigError(
                    f"pools.{pool_name}.model: {place} is not the model of pool {first_pool!r} ({first}): "
                    f"{'; '.join(found)}. Pools of one application serve one model; give another one an application "
                    "of its own"
                )


def _engine_options(engine: dict[str, Any]) -> dict[str, Any]:
    places = {"model": "args.model or args.pools[].model", "tensor_parallel_size": "args.pools[].tensor_parallel_size"}
    for name, place in places.items():
        if name in engine:
            raise ValueError(f"{name} is set by {place}; remove it here")
    try:
        EngineConfig(model="", **engine)
    except ValidationError as error:
        raise ValueError(mistakes(error, EngineConfig)) from None
    return engine


def _model_place(model: str) -> str:
    """The absolute path of the model's folder, or the name of its repository."""
    given = Path(model).expanduser()
    candidates = [given] if given.is_absolute() else [Path.cwd() / given, PROJECT_ROOT / given]
    for folder in candidates:
        if folder.is_dir():
            return str(folder.resolve())
    if is_repository(model):
        return model
    looked = " and ".join(dict.fromkeys(str(folder) for folder in candidates))
    raise ConfigError(
        f"model: there is no folder {model!r} (looked for {looked}); give the path of a downloaded model, the same on "
        "every node of the cluster, or the name of a repository, organisation/name"
    )
