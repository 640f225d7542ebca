"""The kernel's side: operations translate, mount.py keeps the mount's life. Only this package knows pyfuse3."""
