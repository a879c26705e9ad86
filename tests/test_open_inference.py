"""Clients of other people: Triton's, and the reflection and health clients that come with gRPC."""

from __future__ import annotations

import json
import subprocess
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.up import Up, run

# A process of its own: both sides bring stubs of the package `inference`.
TRITON = """
import json, sys
import numpy as np
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("agnews")
metadata = client.get_model_metadata("agnews")
texts = np.array([text.encode() for text in json.loads(sys.argv[2])], dtype=object)
given = triton.InferInput("text", [len(texts)], "BYTES")
given.set_data_from_numpy(texts)
wanted = [triton.InferRequestedOutput(name) for name in ("label", "probabilities", "route")]
reply = client.infer("agnews", [given], outputs=wanted, request_id="7")
errors = []
for name, shape in (("nobody", [1]), ("agnews", [3])):
    bad = triton.InferInput("text", [1], "BYTES")
    bad.set_data_from_numpy(np.array([b"a"], dtype=object))
    bad._input.ClearField("shape")
    bad._input.shape.extend(shape)
    try:
        client.infer(name, [bad])
    except triton.InferenceServerException as error:
        errors.append(error.status())
print(json.dumps({
    "platform": metadata.platform,
    "id": reply.get_response().id,
    "labels": [label.decode() for label in reply.as_numpy("label")],
    "probabilities": reply.as_numpy("probabilities").tolist(),
    "routes": [route.decode() for route in reply.as_numpy("route")],
    "errors": errors,
}))
"""


def test_tritons_client_gets_the_mesh_answers(mesh: Up, headlines: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TRITON, mesh.grpc, json.dumps(headlines)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    reply = json.loads(ended.stdout)
    assert (reply["platform"], reply["id"]) == ("expertmesh", "7")
    assert set(reply["routes"]) == {"mesh"}
    assert reply["errors"] == ["StatusCode.NOT_FOUND", "StatusCode.INVALID_ARGUMENT"]
    lines = run("classify", "--address", mesh.grpc, "--json", *headlines).stdout.splitlines()
    ours = [json.loads(line) for line in lines]
    assert reply["labels"] == [answer["label"] for answer in ours]
    assert reply["probabilities"] == [list(answer["probabilities"].values()) for answer in ours]


def test_every_process_answers_the_health_protocol_for_each_of_its_services(mesh: Up) -> None:
    for name, process in mesh.processes().items():
        with grpc.insecure_channel(process["address"]) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            for service in ("", *_served(channel)):
                if service.startswith("grpc."):
                    continue
                if service.endswith(("DescriptionService", "LinkService")):
                    continue
                reply = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING, (name, service)


def test_reflection_is_enough_to_call_the_gateway(mesh: Up) -> None:
    with grpc.insecure_channel(mesh.grpc) as channel:
        assert {
            "expertmesh.v1.InferenceService",
            "expertmesh.v1.DescriptionService",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
        } <= set(_served(channel))
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("expertmesh.v1.InferenceService").FindMethodByName("Classify")
        assert {"texts", "contract", "route"} <= {field.name for field in method.input_type.fields}


def _served(channel: grpc.Channel) -> list[str]:
    return list(ProtoReflectionDescriptorDatabase(channel).get_services())
