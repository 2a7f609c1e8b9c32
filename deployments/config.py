"""What the ``args`` of ``serve_config.yaml`` may say, checked once before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.checkpoint.hub import is_repository, resolve_model
from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError, UnsupportedError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
NAME_PATTERN = r"^[a-z0-9]([a-z0-9_-]*[a-z0-9])?$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplicaRange(_Section):
    """Bounds between which Serve scales a deployment by its ongoing requests; ``replicas: 2`` means exactly two."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) exceeds max ({self.max})")
        return self


def _exactly(replicas: Any) -> Any:
    return {"min": replicas, "max": replicas} if isinstance(replicas, int) else replicas


Replicas = Annotated[ReplicaRange, BeforeValidator(_exactly)]


class PoolConfig(_Section):
    """Replicas of one kind: the same accelerator, the same number of tensor-parallel ranks.

    Without ``accelerator_type`` the ranks run on the CPU. ``num_cpus`` is what Ray sets aside for each rank (its
    threads are ``engine.num_threads``); None means 0.25 on a CPU pool, so that several ranks fit a laptop, and 1 next
    to an accelerator.
    """

    name: str = Field(default="cpu", pattern=NAME_PATTERN)
    accelerator_type: str | None = Field(default=None, min_length=1)
    tensor_parallel_size: int = Field(default=1, ge=1)
    replicas: Replicas = ReplicaRange(min=1, max=1)
    num_cpus: float | None = Field(default=None, gt=0)

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


class HealthConfig(_Section):
    """When Serve replaces a replica. A dead rank is noticed at once; these are for one that lives and does nothing."""

    check_period_s: float = Field(default=2.0, gt=0)
    check_timeout_s: float = Field(default=30.0, gt=0)
    stalled_after_s: float = Field(default=60.0, gt=0)
    """Seconds without a finished step or a heartbeat of the engine until the replica counts as unhealthy."""
    drain_timeout_s: float = Field(default=60.0, ge=0)
    """Seconds that a replica being stopped may take to finish its requests."""


class AppConfig(_Section):
    """All of ``args``. :meth:`parse` reads it; ``model`` is an absolute path or a repository afterwards."""

    model: str = Field(min_length=1)
    served_model_name: str = Field(default="", validate_default=True)
    engine: dict[str, Any] = Field(default_factory=dict)
    pools: list[PoolConfig] = Field(default_factory=lambda: [PoolConfig()], min_length=1)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)

    @field_validator("served_model_name")
    @classmethod
    def _default_name(cls, name: str, info: Any) -> str:
        return name or Path(info.data.get("model", "")).name

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, engine: dict[str, Any]) -> dict[str, Any]:
        places = {"model": "args.model", "tensor_parallel_size": "args.pools[].tensor_parallel_size"}
        for name, place in places.items():
            if name in engine:
                raise ValueError(f"{name} is set by {place}; remove it here")
        try:
            EngineConfig(model="", **engine)
        except ValidationError as error:
            raise ValueError(_readable(error)) from None
        return engine

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
            ConfigError: an option is missing, unknown or wrong (the message names it), or there is no such model.
            CheckpointError: the repository can't be fetched.
            UnsupportedError: more than one pool, or an architecture that Dibit does not have.
        """
        try:
            config = cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(f"serve_config.yaml, args: {_readable(error)}") from None
        if len(config.pools) > 1:
            names = ", ".join(pool.name for pool in config.pools)
            raise UnsupportedError(f"pools: found {len(config.pools)} ({names}); one pool is served at a time so far")
        place = _model_place(config.model)
        model = ModelConfig.from_folder(resolve_model(place, weights=False))
        for pool in config.pools:
            if model.num_attention_heads % pool.tensor_parallel_size:
                raise ConfigError(
                    f"pools.{pool.name}.tensor_parallel_size: {pool.tensor_parallel_size} does not divide the model's "
                    f"{model.num_attention_heads} attention heads"
                )
        return config.model_copy(update={"model": place})

    def engine_config(self, pool: PoolConfig) -> EngineConfig:
        """The engine options of one pool; a pool without accelerators runs on the CPU unless ``device`` is set."""
        options = dict(self.engine)
        if pool.accelerator_type is None:
            options.setdefault("device", "cpu")
        return EngineConfig(model=self.model, tensor_parallel_size=pool.tensor_parallel_size, **options)


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


def _readable(error: ValidationError) -> str:
    """All mistakes in one line, each with the path of its field."""
    problems = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such option"
        elif item["type"] not in ("value_error", "missing"):
            message += f" (found {item['input']!r:.80})"
        problems.append(f"{path}: {message}" if path else message)
    return "; ".join(problems)
