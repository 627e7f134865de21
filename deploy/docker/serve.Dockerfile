# vismem-serve: NVIDIA's Triton and what the served model imports; no torch.
# `make images` builds it; README.md beside this file explains the arguments, and how to pin the base by digest.

# Ubuntu 24.04 with Python 3.12, for which its Python backend's stub is built.
ARG BASE=nvcr.io/nvidia/tritonserver:26.07-py3

FROM ${BASE}
# The lock for a base with Triton in it; `serve` brings the wheel's Triton to a plain Python, with an empty TRITON.
ARG LOCK=triton
COPY deploy/environments/$LOCK.lock /locks/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/serving && \
    python3 -m pip --python /opt/serving/bin/python --disable-pip-version-check install --no-cache-dir \
      --require-hashes --no-deps -r /locks/$LOCK.lock
# NVIDIA's image has a user 1000 already.
RUN { getent passwd 1000 || { groupadd --gid 1000 vismem && useradd --uid 1000 --gid 1000 vismem; }; } && \
    install --directory --owner 1000 --group 1000 /home/vismem
COPY params.yaml /opt/vismem/
COPY deploy/profiles /opt/vismem/deploy/profiles
COPY deploy/docker/serve.sh /opt/vismem/deploy/docker/serve.sh
COPY vismem /opt/vismem/vismem

ARG VERSION=0
ARG REVISION=unknown
ARG SOURCE=
ARG CREATED=
LABEL org.opencontainers.image.title="vismem-serve" \
      org.opencontainers.image.description="VisMem: a Triton server for the model repository in /models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.created="${CREATED}"
ARG TRITON=/opt/tritonserver
ENV PATH=/opt/serving/bin:$PATH \
    HOME=/home/vismem \
    LANG=C.UTF-8 \
    PYTHONPATH=/opt/vismem \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VISMEM_SERVING_PYTHON=/opt/serving/bin/python \
    VISMEM_TRITON=$TRITON
USER 1000:1000
WORKDIR /home/vismem
# HTTP, gRPC, Prometheus
EXPOSE 8000 8001 8002
ENTRYPOINT ["sh", "/opt/vismem/deploy/docker/serve.sh"]
