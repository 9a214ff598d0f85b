"""The HTTP server and the command line; the only room that knows HTTP.

`deltafold.server.app.create_app` makes the application for any engine.
"""
