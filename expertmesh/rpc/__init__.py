"""gRPC as every program of the mesh uses it: servers, channels, deadlines, replicas, errors. It knows no model."""
