#!/usr/bin/env bash
# Wheels that benchmarks/gpu.py needs on a GPU machine without a network, in one folder.
#
#   benchmarks/gpu_wheels.sh FOLDER [INSTALLED]
#
# The machine must have torch, transformers and accelerate with what they need (the lowest versions:
# docs/gpus.md). INSTALLED is what `pip list --format freeze` prints there: what it names is left
# out. Without it pandas with its own needs and pillow are taken to be there. On the machine, in a
# clone of this repository:
#
#   pip install --no-index --no-deps --target site FOLDER/*.whl
#   PYTHONPATH=site:. python benchmarks/gpu.py --minutes 9
#
# ALSO names packages to bring although they are there, such as a newer transformers.
# PYTHON_VERSION (3.12) and ARCHITECTURE (x86_64) are the machine's, PYTHON is what downloads here,
# with pip and torch (DeepSpeed is built from its source). More than LIMIT_MB (60) is an error.
set -euo pipefail

folder=${1:?usage: benchmarks/gpu_wheels.sh FOLDER [INSTALLED]}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit_mb=${LIMIT_MB:-60}

# What twn-rl[train,deepspeed] needs besides torch, transformers, accelerate and theirs. httpx2 is
# left out: only endpoints that draft thoughts are asked through it.
packages="annotated-types datasets deepspeed dill einops hjson msgpack msgspec multiprocess ninja pandas
peft pillow py-cpuinfo pyarrow pydantic pydantic-core python-dateutil six trl typing-inspection
tzdata xxhash"
# Lower than constraints.txt: the newest wheel would take the room of all the others.
pyarrow=pyarrow==24.0.0

normal() { tr '[:upper:]_' '[:lower:]-'; }
here=$'pandas\npillow\nsix\npython-dateutil\ntzdata'
test $# -lt 2 || here=$(sed 's/[ =@].*//' "$2" | normal)
options=(--python-version "${PYTHON_VERSION:-3.12}" --implementation cp)
for tag in manylinux_2_{28,27,26,24,17} manylinux2014 manylinux_2_12 manylinux2010 manylinux1; do
  options+=(--platform "${tag}_${ARCHITECTURE:-x86_64}")
done

mkdir -p "$folder"
for name in $packages ${ALSO:-}; do
  grep -qw "$name" <<<"${ALSO:-}" || ! grep -qx "$name" <<<"$here" || continue
  pin=$(normal <"$root/constraints.txt" | grep "^$name==" || echo "$name")
  test "$name" != pyarrow || pin=$pyarrow
  if [ "$name" = deepspeed ]; then # published as source only; its operators compile when they run
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation -w "$folder" "$pin"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: "${options[@]}" -d "$folder" "$pin"
  fi
done

bytes=$(cat "$folder"/*.whl | wc -c)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((bytes / 1000000)) MB in $folder"
if [ "$bytes" -gt $((limit_mb * 1000000)) ]; then
  echo "more than $limit_mb MB: pass what is installed there, or raise LIMIT_MB" >&2
  exit 1
fi
