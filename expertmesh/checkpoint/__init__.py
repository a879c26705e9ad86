"""Model folders: the manifest, splitting into parts, loading a part."""
