# Helpers of the scripts of this folder; sourced by them, changes nothing by itself.
# shellcheck shell=bash

# shellcheck disable=SC2034 # used by the scripts
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

# Prints the script's head comment and ends, if the first argument asks for help or is missing.
usage_unless() {
    if (($1 > $2)) || [[ ${3:-} == --help || ${3:-} == -h ]]; then
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
        exit 2
    fi
}

# Takes what `make install` made, where no environment with deepspeed is active.
find_environment() {
    local own=${folder%/*}/.venv/bin
    if ! command -v deepspeed >/dev/null && [[ -x $own/deepspeed ]]; then export PATH=$own:$PATH; fi
}

# Runs the command in place of the script, or with DRY_RUN=1 only prints it.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
        exit 0
    fi
    exec "$@"
}

# GPUs of this node; 0 where there are none.
gpus() {
    python -c 'import torch; print(torch.cuda.device_count())'
}

# A port that is free on this node now.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# DeepSpeed takes host names as they come: one that begins with a dash would become an option of ssh.
check_hostfile() {
    [[ -f $1 ]] || fail "$1: no such hostfile (lines: NAME slots=PROCESSES)"
    local name slots rest number=0
    local -A seen=()
    while read -r name slots rest || [[ -n $name ]]; do
        number=$((number + 1))
        [[ -z $name || $name == \#* ]] && continue
        [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "$1, line $number: '$name' is no host name"
        [[ $slots =~ ^slots=[1-9][0-9]*$ ]] || fail "$1, line $number: '$slots' is not slots=N with N at least 1"
        [[ -z $rest || $rest == \#* ]] || fail "$1, line $number: '$rest' is too much (lines: NAME slots=PROCESSES)"
        [[ -z ${seen[$name]:-} ]] || fail "$1, line $number: $name stands there twice"
        seen[$name]=1
    done <"$1"
    ((${#seen[@]} > 0)) || fail "$1 names no host (lines: NAME slots=PROCESSES)"
}

# Sum of the slots of a checked hostfile.
count_slots() {
    sed -n 's/^[^#].*slots=\([0-9]*\).*/\1/p' "$1" | paste -sd+ | sed 's/^$/0/' | { read -r sum; echo $((sum)); }
}

# pdsh hands arguments to a shell on every node, unquoted.
check_arguments() {
    local word
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_@+=:,./-]*$ ]] || fail "'$word' would be changed by the remote shell: put it into the YAML file"
    done
}
