"""Sessions: a loaded model that answers requests, in this process or on a ring of ranks."""
