"""The life of a mount: from the command that asks for it to the process that serves it and the one that ends it.

    requests.py    what is asked for
    mounting.py    the command's side of a mount, and how a process becomes its daemon
    standby.py     the daemon that is forked before it is known what to mount
    claim.py       the lock of a mount point
    serve_image.py, serve_store.py    what the daemon of one image, of a layer store does; both are a resident.py
    asking.py      `umount` and `status`, from outside

Below are fuse/ (requests of the kernel), control/ (those of commands) and image/ (what is shown).
"""
