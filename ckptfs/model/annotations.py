"""Names of annotations that more than one part of ckptfs reads or writes (image-spec annotations.md, and ours).

Those of one document only are beside its code: model/index.py, model/oci.py, push/facts.py.
"""

BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
OURS = "dev.ckptfs."  # made anew by every push, never copied from the source
ROLE = "dev.ckptfs.role"  # on a layer: what it holds, see push/plan.py
ROOTFS_DIGEST = "dev.ckptfs.rootfs.digest"  # on a checkpoint image: the manifest of its root file system image
VERSION = "dev.ckptfs.version"  # on an image: what pushed it
