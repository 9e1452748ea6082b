"""The server and client objects of the installed Shoal."""
