"""The load generator: arrivals, senders, measured streams and one result row. It imports nothing else of this project.

`arrivals` and `prompts` decide what is sent when, `wire` and `senders` send it, `watch` times one stream, `drive` runs a load and
`summary` makes the row. Invariant: the sender measures itself too, so that a row says when the generator and not the server was the limit.
"""
