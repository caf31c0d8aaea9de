"""The store's migrations, run by `Store.open`; a new one goes into `versions/`."""
