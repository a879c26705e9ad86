#!/bin/sh
# Writes the stubs of protos/ into the packages they belong to: generate.sh PYTHON [ROOT].
# PYTHON must have grpcio-tools as pyproject.toml pins it: the oldest whose stubs users' libraries must load.
set -eu
PYTHON=$(realpath -s "$1")
ROOT=$(realpath "${2:-$(dirname "$0")/..}")
cd "$(dirname "$0")"
"$PYTHON" -W ignore -m grpc_tools.protoc --proto_path=. \
    --python_out="$ROOT" --pyi_out="$ROOT" --grpc_python_out="$ROOT" \
    expertmesh/v1/*.proto inference/*.proto
