#!/bin/sh
# Makes the lock files anew (`make locks`): what pyproject.toml and deploy/triton/requirements.txt ask for, with the
# hashes of every file, in the versions that .venv and .venv-serving hold, since those are what the tests ran with.
# Needs uv (`pip install uv`, or UV=...). torch-cpu.lock is kept by hand.
set -eu
cd "$(dirname "$0")/../.."
folder=deploy/docker
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

lock() {  # ENVIRONMENT OUTPUT ARGUMENT...
    environment=$1 output=$2
    shift 2
    "$environment/bin/python" -m pip freeze --exclude-editable | grep -v '^torch==' > "$scratch/constraints.txt"
    "${UV:-uv}" pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command 'make locks' \
        --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
        --only-binary :all: --no-binary kfp-server-api --no-binary antlr4-python3-runtime \
        --constraint "$scratch/constraints.txt" --output-file "$output" "$@"
}

# psycopg2: MLflow's server on PostgreSQL runs from vismem-train too
echo psycopg2-binary > "$scratch/psycopg2.in"
lock .venv "$scratch/all.lock" pyproject.toml --extra pipeline --extra export --extra kubeflow "$scratch/psycopg2.in"
lock .venv-serving $folder/serve.lock deploy/triton/requirements.txt

# torch and what only its CUDA build needs go into a file of their own; a package is its line and the indented ones below
awk -v torch=$folder/torch-cuda.lock -v rest=$folder/train.lock '
    /^#/ { print > torch; print > rest; next }
    /^[a-z]/ { out = $0 ~ /^(torch|triton|(nvidia|cuda)-[a-z0-9-]+)==/ ? torch : rest }
    { print > out }
' "$scratch/all.lock"
sed -n '/^#/p' $folder/train.lock > $folder/build.lock
awk '/^[a-z]/ { keep = /^setuptools==/ } keep' $folder/train.lock >> $folder/build.lock
