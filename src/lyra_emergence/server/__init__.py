"""An OpenAI-compatible server over one loaded model, with a page to chat on.

    bodies      what a request may hold, from the types of the `openai` package
    asking      a request's body -> `Asked`: token ids and options
    room        how much may run at once, from the plan
    pace        how fast tokens come
    engine      answers in threads that share the model, and those that wait
    events      from the engine's threads to the event loop
    replies     `Chunk`s -> objects of the `openai` package
    refusals    errors -> a status and an error in OpenAI's form
    guard       who may ask, and how much: host, origin, key, size of the body
    metrics     the engine's figures in Prometheus' form
    streams     server-sent events
    page        the page, from the files in `assets`
    conversing  a question of the page -> `Asked`, and its answer as events
    picture     where the model's blocks are now
    broadcast   news for many listeners
    watch       what listeners are told of the model
    own_routes  the page's routes
    app         OpenAI's routes, and all of it together
    running     the process: signals, and the limit on how long the last answers may take

Only `room`, `pace` and `engine` can be imported without the extra `serve`.
"""

from __future__ import annotations
