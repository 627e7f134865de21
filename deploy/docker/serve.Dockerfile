# vismem-serve: tritonserver from its wheel and what the served model imports; no torch.
# `make images` builds it; README.md beside this file explains the arguments.

# As in train.Dockerfile, which says how to refresh the digest.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS serving
COPY deploy/environments/serve.lock /locks/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/serving && \
    python3 -m pip --python /opt/serving/bin/python --disable-pip-version-check install --no-cache-dir \
      --require-hashes -r /locks/serve.lock

FROM ${BASE}
COPY --from=serving /opt/serving /opt/serving
RUN groupadd --gid 1000 vismem && useradd --uid 1000 --gid 1000 --create-home vismem
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
ENV PATH=/opt/serving/bin:$PATH \
    LANG=C.UTF-8 \
    PYTHONPATH=/opt/vismem \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    VISMEM_SERVING_PYTHON=/opt/serving/bin/python
USER 1000:1000
WORKDIR /home/vismem
# HTTP, gRPC, Prometheus
EXPOSE 8000 8001 8002
ENTRYPOINT ["sh", "/opt/vismem/deploy/docker/serve.sh"]
