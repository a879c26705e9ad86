"""Links: unary calls over one long-lived connection, which costs less than half of what calls by themselves do.

A call means the same either way: it has a deadline, can be cancelled, carries request id and trace context, and ends
with one status. `channel` is the caller's side, `servicer` the other. Frames travel over a gRPC stream (`stream`), or,
between neighbours on one host, over a unix socket of their own (`socket`), which costs a third of that again.
"""
