"""What must survive: the database (tables and every SQL statement), files by digest, the data folder."""

from gateway.store.database import Store

__all__ = ["Store"]
