"""expertmesh: Mixture-of-Experts transformers served as a mesh of gRPC services, one expert a service."""

__version__ = "0.1.0"
