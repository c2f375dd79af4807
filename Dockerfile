# CPU: docker build --build-arg TORCH_INDEX=URL . (the CPU wheel index that PyTorch's install page names)
# GPU: docker build --build-arg EXTRA=gpu . (vLLM brings its own torch); run the image with --gpus all
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRA=cpu
ARG TORCH_INDEX=

# vLLM compiles kernels at start on a GPU, and needs the NUMA library on CPUs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make gcc g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /kibitz
COPY pyproject.toml Makefile README.md LICENSE ./
COPY bot bot
COPY connectors connectors
COPY learning learning

# This also converts the built-in model. DEV= leaves out what only tests need.
ENV KIBITZ_CACHE=/kibitz/cache
RUN make setup EXTRA=${EXTRA} TORCH_INDEX=${TORCH_INDEX} DEV=

# `docker run --user` may name another user. Hugging Face, vLLM and Triton keep their files under HOME, in the volume.
RUN useradd --uid 1000 --home-dir /data --create-home kibitz
ENV HOME=/data
USER kibitz
VOLUME /data
EXPOSE 8080
# On SIGTERM kibitz finishes the answers under way, then ends.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/kibitz/.venv/bin/kibitz"]
CMD ["serve", "--config", "/data/config.toml", "--data-dir", "/data"]
