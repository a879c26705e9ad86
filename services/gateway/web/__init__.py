"""The gateway's HTTP side: it only translates, between HTTP and the same requests that come over gRPC.

`application` puts it together: `infer` has the two routes that classify, `openai` those of OpenAI's API. On the way in
go `body`, `fields`, `prompts` and `calls`, on the way out `shapes`, `replies` and `sse`; `errors` says how to fail.
"""
