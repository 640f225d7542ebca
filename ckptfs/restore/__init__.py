"""A checkpoint in a registry becomes a running container again, in one command: `ckptfs restore`, `check` and `stub`.

keeper.py is the door, flow.py the beginning, container.py, podman.py and containerd.py the three ways on; each sibling
does one thing. Knows criu, runc, crun and podman as programs, containerd by its API; images come through mounts
(ckptfs.daemon) and are never read here but for the documents that say what was checkpointed.
"""
