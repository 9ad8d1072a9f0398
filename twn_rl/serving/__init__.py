"""`twn-rl serve`: one process, one model, both adapters, over HTTP.

Requests become jobs of one engine thread, whose vectors are those of `ThinkingEmbedder`. What a
client may ask for is checked and accounted for before any work starts. Refuses to know training
and scores; `create_app` takes further routers, so that a page can be served by the same process.
"""
