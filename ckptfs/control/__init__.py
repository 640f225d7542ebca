"""One unix socket per mount: status and stop, as one JSON line each way. Owner only (0600 and SO_PEERCRED)."""
