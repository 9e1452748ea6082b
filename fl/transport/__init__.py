"""How peers' vectors travel between nodes: within one process, or over TLS sockets (`fl.transport.base`)."""
