"""The model: what its stages compute. It knows no network. Importing this package imports no torch."""
