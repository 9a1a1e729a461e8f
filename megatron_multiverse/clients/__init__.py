"""What talks to servers over HTTP: a chat in the terminal, load, soak, and decoding by stock engines.

They know a server by its routes alone, so they work with others, too, where these have the routes.
"""
