"""The model: what its stages compute. Torch only; it knows no network. (Importing this package imports no torch.)"""
