# syntax=docker/dockerfile:1
# Dibit's images. Weights are never inside; mount them or let the pods fetch them.
#
#   docker build --target cuda --tag dibit:0.1.0 .
#   docker build --target cpu  --tag dibit:0.1.0-cpu --build-arg TORCH_INDEX=<address of PyTorch's index of CPU builds> .
#
# Pin the base by digest for a build that can be repeated: --build-arg BASE=python:3.12-slim-bookworm@sha256:<digest>

ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The release of torch that Dibit is tested with.
ARG TORCH=torch==2.13.0
# Another index for torch alone; empty takes pip's own.
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY engine engine
COPY deployments deployments
RUN /opt/venv/bin/pip install ".[serve,tracing]"

# Triton, for GPUs.
FROM build AS build-cuda
RUN /opt/venv/bin/pip install ".[serve,tracing,gpu]"

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
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --start-period=5m --interval=15s --timeout=5s CMD ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/health"]
CMD ["serve", "run", "serve_config.yaml"]

FROM runtime AS cpu
COPY --from=build /opt/venv /opt/venv

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv
