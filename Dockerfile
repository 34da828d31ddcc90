# quantadapt with the versions that were tested together, for a CPU or for CUDA:
#
#     docker build -t quantadapt .
#     docker build -t quantadapt:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#
#     docker run --rm -v "$PWD:/work" --user "$(id -u)" quantadapt run demo
#     docker run --rm -v "$PWD:/work" --user "$(id -u)" --gpus all quantadapt:cuda run config.yaml
#
# /work is where you are; models of the hub and other caches are below /cache: mount that, too, to keep them.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# Where torch comes from: the index for CPUs, or PyPI, whose torch for Linux brings CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Backends and servers to install, names of pyproject.toml; `all,serve` for everything.
ARG EXTRAS=hqq,bitsandbytes,torchao,quanto,compressed-tensors,gguf,serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY constraints.txt .
# PyPI has what torch needs in the pinned versions; of both the index of CPUs names its torch the newer (2.13.0+cpu).
RUN pip install -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE ./
COPY quantadapt quantadapt
COPY configs configs
COPY plugins plugins
RUN pip install -c constraints.txt ".[$EXTRAS]"

FROM python:${PYTHON}-slim
# Triton compiles a few lines of C when a kernel is first used on a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --no-create-home quantadapt \
    && mkdir /work /cache \
    && chmod 1777 /work /cache
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/cache HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
ENTRYPOINT ["quantadapt"]
CMD ["--help"]
