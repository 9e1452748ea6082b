"""Where clients run: grids that carry Flower messages between the server and the clients.

Importing this package loads nothing; each grid is a module of its own.
"""
