# Three targets; see deploy/README.md.
#
#   docker build --target serving-cpu -t ferryman:serving-cpu .                                    translates; no torch
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... -t ferryman:cpu .                trains and translates
#   docker build --target cuda -t ferryman:cuda .                                                  the same on GPUs
#
# PYTHON_IMAGE pins the base: pass it with its digest, as name:tag@sha256:... Any image of Debian 12 with Python 3.11 will
# do: deploy/locks has the digest of every package, for CPython 3.11 on x86-64; `make locks` writes them. The target cpu
# needs PIP_EXTRA_INDEX_URL, the index of PyTorch's CPU wheels, whose build of torch the lock names.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
# Without pip in it: the base image's own installs into it, and nothing else will.
RUN python -m venv --without-pip /opt/ferryman
ENV PIP_PYTHON=/opt/ferryman/bin/python
WORKDIR /build
COPY deploy/locks locks
COPY constraints.txt ./

# Packages come first, each with its digest: a change of the product does not download them again.
FROM builder AS builder-serving-cpu
RUN pip install --require-hashes -r locks/serving-cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install -c constraints.txt --no-deps ".[server,cpu,tracing]"

FROM builder AS builder-cpu
ARG PIP_EXTRA_INDEX_URL
RUN pip install --require-hashes -r locks/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install -c constraints.txt --no-deps ".[server,cpu,train,tracing]"

FROM builder AS builder-cuda
RUN pip install --require-hashes -r locks/cuda.txt
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install -c constraints.txt --no-deps ".[server,gpu,train,tracing]"

FROM ${PYTHON_IMAGE} AS runtime
# tini passes signals on and collects what has ended: the service may then be process 1's child, as on any machine.
RUN apt-get update \
    && apt-get install -y --no-install-recommends "tini=0.19.0-*" \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 /data
# A number, not a name: Kubernetes can then see that it is not root.
USER 10001:10001
WORKDIR /data
# Nothing is written outside /data and /tmp, so the root file system may be read-only. Python imports nothing from the
# working folder, which holds data, and ONNX Runtime sends nothing to its maker.
ENV PATH=/opt/ferryman/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    FERRYMAN_HOST=0.0.0.0 \
    FERRYMAN_METRICS_HOST=0.0.0.0 \
    FERRYMAN_PROBE_HOST=0.0.0.0 \
    FERRYMAN_DATA_DIR=/data
EXPOSE 50051 50052 9464
VOLUME ["/data"]
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["ferryman-service", "health", "--probe"]
ENTRYPOINT ["tini", "--", "ferryman-service"]
CMD ["serve"]
LABEL org.opencontainers.image.title="Ferryman" \
      org.opencontainers.image.description="Trains encoder-decoder Transformers and serves them over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS serving-cpu
COPY --from=builder-serving-cpu /opt/ferryman /opt/ferryman
CMD ["serve", "--roles", "translation"]
# What changes with every build comes last, so that the layers above stay.
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM runtime AS cuda
# Training compiles the network for the GPU, and Triton builds its launchers with a C compiler. Without one training
# works too, slower. The headers of Python are in the base image. What was compiled stays in the volume, for later runs
# and because nothing in /tmp may be executed where that is a tmpfs.
USER 0:0
RUN apt-get update \
    && apt-get install -y --no-install-recommends "gcc=4:12.2.*" "libc6-dev=2.36-*" \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=builder-cuda /opt/ferryman /opt/ferryman
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/data/compiled \
    TRITON_CACHE_DIR=/data/compiled/triton
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"

FROM runtime AS cpu
COPY --from=builder-cpu /opt/ferryman /opt/ferryman
ARG VERSION=""
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
