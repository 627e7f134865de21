# vismem-train: the library with everything that training, evaluation and the Kubeflow components import.
# `make images` builds it; README.md beside this file explains the arguments.

# The digest of python:3.11-slim-bookworm on 2026-10-01. To refresh: `skopeo inspect docker://IMAGE:TAG` or
# `docker buildx imagetools inspect IMAGE:TAG`, and put the index's digest here.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# Triton's environment, apart because it needs numpy < 2: the deploy step smoke-tests the model on a real server, the
# wheel's, which nobody outside the pod can reach. --no-deps: a lock is whole, and pip refuses an extra of what it hashes.
FROM ${BASE} AS serving
COPY deploy/environments/serve.lock /locks/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/serving && \
    python3 -m pip --python /opt/serving/bin/python --disable-pip-version-check install --no-cache-dir \
      --require-hashes --no-deps -r /locks/serve.lock

FROM ${BASE} AS packages
# PyPI's torch is the CUDA build with its NVIDIA packages; the CPU build has another hash and lies on PyTorch's index.
ARG TORCH=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY deploy/environments/build.lock deploy/environments/torch-$TORCH.lock deploy/environments/train.lock /locks/
# Two packages come as source only: setuptools, also from a lock, builds them without fetching anything unchecked.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m venv --without-pip /opt/venv && \
    pip="python3 -m pip --python /opt/venv/bin/python --disable-pip-version-check install --no-cache-dir --require-hashes --no-deps" && \
    $pip -r /locks/build.lock && \
    if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"; fi && \
    $pip --no-build-isolation -r /locks/torch-$TORCH.lock -r /locks/train.lock

FROM ${BASE}
COPY --from=serving /opt/serving /opt/serving
COPY --from=packages /opt/venv /opt/venv
RUN groupadd --gid 1000 vismem && useradd --uid 1000 --gid 1000 --create-home vismem
# The library lies as in a checkout, since its assets, profiles, Triton model and default parameters lie beside it.
COPY pyproject.toml README.md LICENSE params.yaml dvc.yaml /opt/vismem/
COPY assets /opt/vismem/assets
COPY deploy/profiles /opt/vismem/deploy/profiles
COPY deploy/triton /opt/vismem/deploy/triton
COPY examples/images /opt/vismem/examples/images
COPY examples/questions.jsonl /opt/vismem/examples/
COPY vismem /opt/vismem/vismem
RUN python3 -m pip --python /opt/venv/bin/python --disable-pip-version-check install --no-cache-dir \
      --no-deps --no-build-isolation --no-index --editable /opt/vismem

ARG VERSION=0
ARG REVISION=unknown
ARG SOURCE=
ARG CREATED=
LABEL org.opencontainers.image.title="vismem-train" \
      org.opencontainers.image.description="VisMem: training, evaluation, release; the Kubeflow components' image" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.created="${CREATED}"
# VISMEM_GIT_COMMIT: every artifact's lineage names the commit, and there is no checkout here to ask.
ENV PATH=/opt/venv/bin:$PATH \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=passive \
    GIT_PYTHON_REFRESH=quiet \
    VISMEM_GIT_COMMIT=${REVISION} \
    VISMEM_SERVING_PYTHON=/opt/serving/bin/python
USER 1000:1000
WORKDIR /home/vismem
CMD ["vismem", "--help"]
