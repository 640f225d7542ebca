"""Values in the field's words. Knows no network, no FUSE and no trio."""
