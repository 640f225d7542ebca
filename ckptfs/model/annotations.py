"""Names of annotations that more than one part of ckptfs reads or writes (image-spec annotations.md, and ours)."""

BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
ROOTFS_DIGEST = "dev.ckptfs.rootfs.digest"  # on a checkpoint image: the manifest of its root file system image
