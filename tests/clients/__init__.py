"""Clients that others wrote, against the server: `make clients`."""
