# An image with everything that the stages need, for CPUs; with CUDA by build arguments. Nothing runs as root.
#   docker build -t wsi .
#   docker build -t wsi-cuda --build-arg BASE=nvidia/cuda:<version>-devel-ubuntu24.04 --build-arg ARCHITECTURES=80,90 .
# <version> is the CUDA that torch was built with (torch.version.cuda), so that the operators compile for it.
#   docker run --rm -v "$PWD":/data wsi patch_encoder.slides_to_features slides=/data/slides encoder=imagenet_lite0 output=/data/features
ARG BASE=debian:trixie-slim
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ git \
    && rm -rf /var/lib/apt/lists/*

# address of an index with torch; PyTorch's own one for CPUs saves gigabytes. Empty: PyPI, whose wheels bring CUDA along
ARG TORCH_INDEX=
# CUDA architectures of the compiled operators, as 80,90; empty: the CPU's operators alone
ARG ARCHITECTURES=

WORKDIR /opt/wsi
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONSAFEPATH=1
RUN python3 -m venv /opt/venv \
    && pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "torch>=2.10,<3" "torchvision>=0.25,<1"

# packages first: they are installed anew when the requirements change, and not with every change of the code
COPY requirements-*.txt ./
RUN pip install -r requirements-det.txt -r requirements-mil.txt
COPY . .
RUN pip install --no-deps -e . \
    && python -m wsi_common.ops.build cuda="$([ -n "$ARCHITECTURES" ] && echo yes || echo no)" architectures="[$ARCHITECTURES]"

RUN useradd --create-home wsi
USER wsi
WORKDIR /data
ENTRYPOINT ["python", "-m"]
CMD ["patch_encoder.slides_to_features", "--help"]
