"""Generated stubs of the expertmesh.v1 contract (protos/expertmesh/v1). Never edited."""
