#!/usr/bin/env bash
# Installs the wheel with everything that it requires into an empty environment and asks it a question,
# with no compiler on the PATH: make dist-check
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath -s "$1")  # that builds the wheel
folder=build/dist-check
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m hatchling build -t wheel -d "$folder"

# The same sources give the same bytes in another directory, with all kernels compiled again.
mkdir "$folder/copy"
git ls-files -z smolcli tools hatch_build.py pyproject.toml README.md LICENSE | xargs -0 cp --parents -t "$folder/copy"
(cd "$folder/copy" && env -u PYTHONPATH "$python" -m hatchling build -t wheel)
cmp "$folder"/*.whl "$folder"/copy/dist/*.whl

"$python" -m tools.check_wheel "$folder"/*.whl
"$python" -m venv "$folder/venv"
PATH="$PWD/$folder/venv/bin" pip install --quiet -c constraints.txt "$folder"/*.whl

cd "$folder"
export PATH="$PWD/venv/bin"
unset PYTHONPATH CC
smol pull
smol doctor
smol ask "What is the capital of France?"
