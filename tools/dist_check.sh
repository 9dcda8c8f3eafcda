#!/usr/bin/env bash
# Installs the wheel with everything that it requires into an empty environment and asks it a question,
# with no compiler on the PATH: make dist-check
set -euo pipefail
cd "$(dirname "$0")/.."

python=$1  # that builds the wheel
folder=build/dist-check
rm -rf "$folder"
mkdir -p "$folder"
"$python" -m hatchling build -t wheel -d "$folder"
"$python" -m tools.check_wheel "$folder"/*.whl
"$python" -m venv "$folder/venv"
PATH="$PWD/$folder/venv/bin" pip install --quiet -c constraints.txt "$folder"/*.whl

cd "$folder"
export PATH="$PWD/venv/bin"
unset PYTHONPATH CC
smol pull
smol doctor
smol ask "What is the capital of France?"
