# syntax=docker/dockerfile:1
# Dibit's images. Weights are never inside; mount them or let the pods fetch them.
#
#   docker build --target cuda --tag dibit:0.1.0 .
#   docker build --target cpu  --tag dibit:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# Pin the base by digest for a build that can be repeated: --build-arg BASE=python:3.12-slim-bookworm@sha256:<digest>

ARG BASE=python:3.12-slim-bookworm

# All that Dibit needs. Made again when pyproject.toml changes, not with the sources.
FROM ${BASE} AS dependencies
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The release of torch that Dibit is tested with. Its wheel brings CUDA's libraries, NCCL, Triton and ptxas along.
ARG TORCH=torch==2.13.0
# Another index for torch alone, such as PyTorch's of builds for the CPU or an older CUDA; empty takes pip's own.
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /requirements
COPY pyproject.toml ./
# Without its sources the package is empty, and pip installs what it requires.
RUN --mount=type=cache,target=/root/.cache/pip \
    touch README.md LICENSE \
    && /opt/venv/bin/pip install ".[serve,tracing]" \
    && /opt/venv/bin/pip uninstall --yes dibit

# Triton, should torch not have brought it.
FROM dependencies AS dependencies-cuda
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/venv/bin/pip install ".[gpu]" \
    && /opt/venv/bin/pip uninstall --yes dibit

# Dibit itself.
FROM ${BASE} AS package
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY engine engine
COPY deployments deployments
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# wget: KubeRay's probes ask with it. gcc: Triton compiles a launcher for each kernel when it first runs.
# hadolint ignore=DL3008  # Debian's archive drops superseded versions; the base's digest says how old the rest is
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dibit
WORKDIR /opt/dibit
COPY serve_config.yaml ./
COPY examples/ernie-tiny/2bits examples/ernie-tiny/2bits
ENV PATH=/opt/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
EXPOSE 8000
# Kubernetes does not look at this; KubeRay has probes of its own.
HEALTHCHECK --start-period=5m --interval=15s --timeout=5s CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/health"]
# The example, for whoever may reach the container's port: publish it to 127.0.0.1 unless there are keys.
CMD ["dibit", "serve", "--host", "0.0.0.0"]

# Dependencies first: a change of the sources makes a small layer anew, not the gigabytes below it.
FROM runtime AS cpu
COPY --link --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000:1000

FROM runtime AS cuda
# Which GPUs a container sees is for Docker and Kubernetes to say: a pod that asks for none must not see all.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --link --from=dependencies-cuda /opt/venv /opt/venv
RUN --mount=type=bind,from=package,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
USER 1000:1000
