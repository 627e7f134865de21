#!/bin/sh
# Entry point of vismem-serve: serves the model repository in /models, with tritonserver's log on standard output.
# Further arguments go to `vismem serve`.
set -eu
mkdir -p runs
: > runs/tritonserver.log
tail -F runs/tritonserver.log &
exec python3 -m vismem.cli serve --params /opt/vismem/params.yaml --repository "${MODEL_REPOSITORY:-/models}" --host 0.0.0.0 "$@"
