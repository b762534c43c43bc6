# Two targets: `cpu` and `cuda`. Both train and translate; see deploy/README.md.
#
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... -t ferryman:cpu .
#   docker build --target cuda -t ferryman:cuda .
#
# PIP_EXTRA_INDEX_URL names the index of PyTorch's CPU wheels. Without it the cpu target works too, but is gigabytes
# larger, since the default build of torch brings the CUDA libraries along.
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/ferryman
ENV PATH=/opt/ferryman/bin:$PATH
WORKDIR /build
COPY constraints.txt ./

FROM builder AS builder-cpu
ARG PIP_EXTRA_INDEX_URL
RUN pip install -c constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install -c constraints.txt ".[server,cpu,train]"

FROM builder AS builder-cuda
RUN pip install -c constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY service service
RUN pip install -c constraints.txt ".[server,gpu,train]"

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="Ferryman" \
      org.opencontainers.image.description="Trains encoder-decoder Transformers and serves them over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
# A number, not a name: Kubernetes can then see that it is not root.
RUN install -d -o 10001 -g 10001 /data
USER 10001:10001
WORKDIR /data
ENV PATH=/opt/ferryman/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    FERRYMAN_HOST=0.0.0.0 \
    FERRYMAN_METRICS_HOST=0.0.0.0 \
    FERRYMAN_DATA_DIR=/data
EXPOSE 50051 9464
VOLUME ["/data"]
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["ferryman-service", "health"]
ENTRYPOINT ["ferryman-service"]
CMD ["serve"]

FROM runtime AS cuda
# Training compiles the network for the GPU, and Triton builds its launchers with a C compiler. Without one training
# works too, slower. The headers of Python are in the base image. What was compiled stays in the volume, for later runs
# and because nothing in /tmp may be executed where that is a tmpfs.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=builder-cuda /opt/ferryman /opt/ferryman
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/data/compiled \
    TRITON_CACHE_DIR=/data/compiled/triton

FROM runtime AS cpu
COPY --from=builder-cpu /opt/ferryman /opt/ferryman
