"""The replicas of a service: who belongs to it, who gets a call, and what a call does when one of them fails it."""
