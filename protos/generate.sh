#!/bin/sh
# Writes the stubs of protos/ into the packages they belong to. Called by `make stubs`, which provides the toolchain:
# the oldest grpcio-tools that users' protobuf and grpcio must be able to load.
set -eu
PYTHON=$(realpath -s "$1")
cd "$(dirname "$0")"
"$PYTHON" -m grpc_tools.protoc --proto_path=. --python_out=.. --pyi_out=.. --grpc_python_out=.. \
    expertmesh/v1/*.proto inference/*.proto
