#!/bin/sh
# Makes the lock files anew (`make locks`): what pyproject.toml and deploy/triton/requirements.txt ask for, with the
# hashes of every file. A version stays as it is locked while it fits; UPGRADE=1 takes the newest of everything.
# Needs uv. torch-cpu.lock is kept by hand: PyTorch's index tells its hashes.
set -eu
cd "$(dirname "$0")"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ -n "${UPGRADE:-}" ] || cat torch-cuda.lock train.lock dev.lock > "$scratch/all.lock"
[ -n "${UPGRADE:-}" ] || cp serve.lock triton.lock bootstrap.lock "$scratch"

lock() {  # NAME ARGUMENT...; versions that $scratch/NAME.lock holds are kept
    name=$1
    shift
    (cd ../.. && "${UV:-uv}" pip compile --quiet --generate-hashes --no-annotate --no-emit-index-url \
        --custom-compile-command 'make locks' --python-version 3.11 --python-platform x86_64-manylinux_2_36 \
        --only-binary :all: --no-binary kfp-server-api --no-binary antlr4-python3-runtime \
        --output-file "$scratch/$name.lock" "$@" > /dev/null)
}

# NAME CONDITION: the packages of all.lock that meet an awk condition on their `name`; hashes are the lines below a name
part() {
    awk "/^#/ { print; next } /^[a-z]/ { name = \$0; sub(/==.*/, \"\", name); keep = ($2) } keep" "$scratch/all.lock" > "$1.lock"
}

names() {  # FILE: |name|name| of the packages in a lock
    sed -n 's/^\([a-z][a-z0-9-]*\)==.*/\1/p' "$1" | tr '\n' '|' | sed 's/^/|/'
}

has() {  # NAMES: an awk condition
    echo "index(\"$1\", \"|\" name \"|\")"
}

lock all pyproject.toml --all-extras
# psycopg2: MLflow's server on PostgreSQL runs from vismem-train too
printf 'psycopg2-binary\n' > "$scratch/psycopg2.in"
lock train pyproject.toml --extra pipeline --extra export --extra kubeflow --extra signing "$scratch/psycopg2.in" --constraint "$scratch/all.lock"
printf 'hatchling\nsetuptools\n' > "$scratch/build.in"
lock build "$scratch/build.in" --constraint "$scratch/all.lock"
lock serve deploy/triton/requirements.txt
lock triton deploy/triton/container.txt --constraint "$scratch/serve.lock"
printf 'uv\n' > "$scratch/uv.in"
lock bootstrap "$scratch/uv.in"
cp "$scratch/serve.lock" "$scratch/triton.lock" "$scratch/bootstrap.lock" "$scratch/build.lock" .

# torch and what only its CUDA build needs go into a file of their own
cuda='name ~ /^(torch|triton|(nvidia|cuda)-.*)$/ && name != "nvidia-ml-py"'  # that one is for MLflow's figures of GPUs
train=$(has "$(names "$scratch/train.lock")")
part torch-cuda "$cuda"
part train "!($cuda) && $train"
part dev "!($cuda) && !$train"
