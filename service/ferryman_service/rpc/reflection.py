"""gRPC reflection, so that a client needs no stubs: version 1, and v1alpha for clients older than it.

Both versions have the same messages (https://github.com/grpc/grpc-proto, grpc/reflection); the package that serves them
knows v1alpha alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

_FILE: Final = "grpc/reflection/v1/reflection.proto"
V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final[str] = reflection.SERVICE_NAME
_METHOD: Final = "ServerReflectionInfo"


def add_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Serve both versions; they name `services`, whose generated code is loaded, and themselves."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer((*services, V1, V1ALPHA))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(V1, {_METHOD: method}),))


def _describe_v1() -> None:
    """Make the description of version 1, which a client may ask for, out of that of v1alpha."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_FILE)
    except KeyError:
        file = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        # A name is stored with its length before it: the text form can be edited, the bytes cannot.
        text = str(file).replace("grpc.reflection.v1alpha", "grpc.reflection.v1")
        file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
        file.name = _FILE
        pool.Add(file)
