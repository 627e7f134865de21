#!/bin/sh
# Builds vismem-train and vismem-serve (`make images`) with docker, podman or buildah, whichever works here.
# Settings come from the environment; README.md beside this file lists them.
set -eu
cd "$(dirname "$0")/../.."

engine=${ENGINE:-}
if [ -z "$engine" ]; then
    if docker info >/dev/null 2>&1; then engine=docker
    elif command -v podman >/dev/null; then engine=podman
    elif command -v buildah >/dev/null; then engine=buildah
    else echo "build.sh: no docker daemon, podman or buildah here: install one, or name one in ENGINE" >&2; exit 1
    fi
fi

[ "$(basename "$engine")" != buildah ] || BUILD_FLAGS="--layers ${BUILD_FLAGS:-}"  # reuse layers, as the others do

python=$(sed -n 's/^ARG BASE=//p' deploy/docker/train.Dockerfile)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD)
[ -z "$(git status --porcelain --untracked-files=no)" ] || revision=$revision-dirty

build() {  # IMAGE ARGUMENT...
    name=${REGISTRY:+$REGISTRY/}$1
    file=deploy/docker/${1#vismem-}.Dockerfile
    shift
    [ -n "${TAG:-}" ] || set -- --tag "$name:latest" "$@"
    # shellcheck disable=SC2086  # BUILD_FLAGS is a list of words
    "$engine" build --file "$file" --tag "$name:${TAG:-$version}" \
        --build-arg VERSION="$version" --build-arg REVISION="$revision" --build-arg SOURCE="${SOURCE:-}" \
        --build-arg CREATED="$(git log -1 --format=%cI)" \
        ${PIP_CONF:+--secret id=pip_conf,src="$PIP_CONF"} ${BUILD_FLAGS:-} "$@" .
    echo "built $name:${TAG:-$version} with $engine"
}

for image in ${IMAGES:-serve train}; do
    case $image in
        train) build vismem-train ${BASE:+--build-arg BASE="$BASE"} --build-arg TORCH="${TORCH:-cuda}" \
            ${TORCH_INDEX+--build-arg TORCH_INDEX="$TORCH_INDEX"} ;;
        serve)
            if [ "${TRITON:-}" = wheel ]; then
                build vismem-serve --build-arg BASE="${BASE:-$python}" --build-arg LOCK=serve --build-arg TRITON=
            else build vismem-serve ${TRITON:+--build-arg BASE="$TRITON"}
            fi ;;
        *) echo "build.sh: no image '$image': train or serve" >&2; exit 1 ;;
    esac
done
