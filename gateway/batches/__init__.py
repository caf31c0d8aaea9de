"""Batches: a file of requests, asked one by one of the gateway's own endpoints, behind everybody who waits for an answer."""
