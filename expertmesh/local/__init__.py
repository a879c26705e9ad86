"""A mesh on this machine: every service a local process, and none left behind."""
