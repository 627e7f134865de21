#!/bin/sh
# Makes .venv or .venv-serving (`make setup`) from the lock files beside this script: with uv, or else with pip.
# Settings come from the environment:
#   PYTHON       a Python 3.11 or 3.12; default: the first of python3, python3.12 and python3.11 that is one
#   TORCH        cpu or cuda; default: cuda where nvidia-smi finds a GPU
#   TORCH_INDEX  where the CPU build of torch is looked for after your own indexes; default: PyTorch's
# uv does not read pip's configuration (indexes, wheels on disk, certificates), so it is handed on from here.
set -eu
cd "$(dirname "$0")/../.."
environment=$1
locks=deploy/environments
log=$environment/setup.log
started=$(date +%s)

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

[ "$(uname)" = Linux ] || fail "Linux only, since tritonserver is; elsewhere \`pip install .\` gives \`vismem ask\` and training"

python=
for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
    case $(version "$candidate") in 3.11 | 3.12) python=$(command -v "$candidate"); break ;; esac
done
if [ -z "$python" ]; then
    found=$(version "${PYTHON:-python3}")
    fail "VisMem needs Python 3.11 or 3.12, and ${PYTHON:-python3} is ${found:-not there}: install one" \
        "(\`uv python install 3.12\`, or your system's package) and name it: make setup PYTHON=/path/to/python3.12"
fi

case $environment in
    .venv)
        if [ -z "${TORCH:-}" ]; then
            if nvidia-smi -L >/dev/null 2>&1; then TORCH=cuda; else TORCH=cpu; fi
        fi
        [ -f "$locks/torch-$TORCH.lock" ] || fail "TORCH is '$TORCH': cpu or cuda"
        set -- "$locks/build.lock" "$locks/torch-$TORCH.lock" "$locks/train.lock" "$locks/dev.lock"
        holds="torch for $TORCH, " size=3
        [ "$TORCH" = cpu ] || size=9
        ;;
    .venv-serving) set -- "$locks/serve.lock"; holds= size=1 ;;
    *) fail "no environment '$environment': .venv or .venv-serving" ;;
esac

if [ "$(version "$environment/bin/python")" != "$(version "$python")" ]; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$size" ] || fail "$environment takes $size GB, and $free GB are free in $PWD: free some, or clone elsewhere"
    rm -rf "$environment"
fi

hand_on() {  # KEY VARIABLE: pip's setting to uv, unless the variable is set
    eval "[ -z \"\${$2:-}\" ]" || return 0
    value=$(printf '%s\n' "$settings" | sed -nE "s/^(:env:|global|install)\.$1='(.*)'\$/\2/p" | head -n 1 | sed 's/\\n/ /g')
    [ -z "$value" ] || export "$2=$value"
}
settings=$("$python" -m pip config list 2>/dev/null || true)
hand_on index-url UV_DEFAULT_INDEX
hand_on extra-index-url UV_INDEX
hand_on find-links UV_FIND_LINKS
hand_on no-index UV_NO_INDEX
hand_on trusted-host UV_INSECURE_HOST
hand_on cert SSL_CERT_FILE
hand_on proxy ALL_PROXY
export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"  # of all indexes, as pip does: the hash decides
export UV_PYTHON_DOWNLOADS=never

uv=${UV:-$(command -v uv || true)}
if [ ! -x "$environment/bin/python" ]; then
    if [ -n "$uv" ]; then said=$("$uv" venv --quiet --python "$python" "$environment" 2>&1) || fail "uv venv: $said"
    else said=$("$python" -m venv "$environment" 2>&1) || fail "$python -m venv does not work: $(echo "$said" | tail -n 1)"
    fi
fi

install() {  # ARGUMENT...
    if [ -n "$uv" ]; then "$uv" pip install --python "$environment/bin/python" "$@"
    else "$environment/bin/python" -m pip --disable-pip-version-check install "$@"
    fi >>"$log" 2>&1
}

unreachable() { grep -qiE 'dns|name resolution|connect|timed out|unreachable' "$log"; }

failed() {
    ! unreachable || fail "no answer from the package index. Check the network, HTTPS_PROXY, or the mirror in pip's" \
        "configuration (\`pip config list\`), and run it again; $log has the details"
    fail "$environment: $(grep -v '^ *$' "$log" | tail -n 1 | sed 's/^ *//'); $log has the details"
}

: >"$log"
if [ -z "$uv" ]; then
    if install --quiet --require-hashes -r $locks/bootstrap.lock; then uv=$environment/bin/uv
    elif unreachable; then failed
    else say "uv is not here and could not be installed: pip does the same, in minutes instead of seconds"
    fi
fi

say "$environment: $holds$(cat "$@" | grep '^[a-z]' | sort -u | wc -l) packages, up to $size GB, by $([ -n "$uv" ] && echo uv || echo pip)"
if [ "$environment" = .venv ]; then
    install --require-hashes --no-deps -r "$1" || failed  # builds what comes as source, and VisMem's editable install
    # The CPU build is not on PyPI: from your own indexes, or else from PyTorch's
    install --require-hashes --no-deps -r "$2" || {
        [ "$TORCH" = cpu ] || failed
        install --require-hashes --no-deps -r "$2" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
    } || failed
    install --require-hashes --no-deps --no-build-isolation -r "$3" -r "$4" || failed
    install --no-deps --no-build-isolation --editable . || failed
else
    install --require-hashes --no-deps -r "$1" || failed
fi
say "$environment is ready, $(du -sm "$environment" | awk '{ printf "%.1f", $1 / 1024 }') GB after $(($(date +%s) - started)) s"
