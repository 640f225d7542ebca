"""CRIU's image files: bytes in, values out. No network, no FUSE, no trio.

    wire            one protobuf message
    images          names, magics, headers and records of the files
    inventory pstree core mm pagemap files namespaces
                    what is in them, a module for each room of CRIU
    memory          where the bytes of an address space lie, in this checkpoint or in a parent
    chunking        where pages files are cut
    increments      pagemaps written anew, of which a part is left to a parent
    restore_plan metadata_order copy_on_write
                    which bytes a restore reads, and in which order

Every function takes the bytes of one image and raises FormatError (LimitExceeded) for all that is not one. Nothing is
imported here: a mount needs only restore_plan, and pays only for that (docs/adr/0003-criu-images.md).
"""
