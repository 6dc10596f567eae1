# syntax=docker/dockerfile:1
# docker build -t tokenloom .     (docs/docker.md says how to run it)
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# A compiler for the native kernels. Its version is that of the distribution, which gets security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/tokenloom
ENV PATH=/opt/tokenloom/bin:$PATH
# torch before the sources: it is the largest layer and changes least. From the index of CPU builds; the others
# bring gigabytes of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "$TORCH_INDEX" "torch>=2.9,<2.14"
WORKDIR /src
COPY pyproject.toml README.md LICENSE CMakeLists.txt ./
COPY csrc csrc
COPY src src
ARG EXTRAS=otel
# The package is what lies here; its own ranges say which versions of others go with it.
# hadolint ignore=DL3013
RUN pip install ".[$EXTRAS]"
# Where state lives. A model only if one is asked for: --build-arg MODEL=smollm2-135m-instruct
# (A folder: the linter sees "TOKEN" in the name.)
# hadolint ignore=DL3064
ENV TOKENLOOM_MODEL_CACHE=/data/models
ARG MODEL=
RUN mkdir -p /data/models && if [ -n "$MODEL" ]; then tokenloom models pull "$MODEL"; fi

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin tokenloom
COPY --from=build /opt/tokenloom /opt/tokenloom
COPY --from=build --chown=10001:10001 /data /data
# hadolint ignore=DL3064
ENV PATH=/opt/tokenloom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HOME=/data/huggingface \
    TOKENLOOM_HOME=/data \
    TOKENLOOM_MODEL_CACHE=/data/models \
    TOKENLOOM_LOGGING__FORMAT=json
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# The first start may fetch a model.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tokenloom"]
CMD ["serve", "--host", "0.0.0.0"]
