"""Names of annotations that more than one part of ckptfs reads or writes (image-spec annotations.md, and ours).

Those of one document only are beside its code: model/index.py, model/oci.py, push/facts.py.
"""

BASE_NAME = "org.opencontainers.image.base.name"
BASE_DIGEST = "org.opencontainers.image.base.digest"
OURS = "dev.ckptfs."  # made anew by every push, never copied from the source
ROLE = "dev.ckptfs.role"  # on a layer: what it holds, see push/plan.py
DELTA_ROLE = "rootfs-diff"
PARENT = "dev.ckptfs.parent"  # on a checkpoint image: the manifest of the one that its unchanged pages are from
ROOTFS_DIGEST = "dev.ckptfs.rootfs.digest"  # on a checkpoint image: the manifest of its root file system image
VERSION = "dev.ckptfs.version"  # on an image: what pushed it

# Our index of another's image: an artifact whose subject is the image, one blob for each layer.
INDEX_ARTIFACT = "application/vnd.ckptfs.index.v1+json"
INDEX_BLOB = "application/vnd.ckptfs.layer-index.v1"
INDEX_LAYER = "dev.ckptfs.layer.digest"

# The working set of a restore: an artifact whose subject is the image, one blob of the same type.
PROFILE_ARTIFACT = "application/vnd.ckptfs.profile.v1+json"
CREATED = "org.opencontainers.image.created"

# awslabs/soci-snapshotter soci/soci_index.go: types of the index, the digest of a v2 index on an image, the layer of a
# zTOC.
SOCI_V1 = "application/vnd.amazon.soci.index.v1+json"
SOCI_V2 = "application/vnd.amazon.soci.index.v2+json"
SOCI_INDEX_DIGEST = "com.amazon.soci.index-digest"
SOCI_LAYER = "com.amazon.soci.image-layer-digest"

ESTARGZ_LAYER = "containerd.io/snapshot/stargz/layer.digest"  # on a table of contents in an image of its own
