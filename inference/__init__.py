"""Generated stubs of the Open Inference Protocol v2 (protos/inference). Never edited."""
