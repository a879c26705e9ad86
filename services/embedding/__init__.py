"""The embedding: token ids to rows."""
