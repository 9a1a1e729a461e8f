"""The text-generation server: HTTP in one process, the engine in another, integers between them.

- `start.py` starts both and ends them in order; `config.py` has every option.
- `engine_process.py` owns the engine and nothing else; `wire.py` is what travels, `engine_client.py` the other end.
- `app.py` is the HTTP application; `routes/` has one file for each family of clients.
- `body.py` reads a request; `fields.py` and `chat_fields.py` say which fields are honoured, `refused.py` which are not.
- `chat_prompt.py` makes ids of a conversation, `tool_calls.py` finds calls in what is answered.
- `answer.py` turns what branches write into text in the order of the answer; `shapes.py` into the clients' objects.
"""
