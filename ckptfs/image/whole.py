"""Layers that only the transport vouches for, hashed as a whole once the node has all of them.

A plain tar has one digest, of everything: a wrong byte shows only when the last one is here. Until then the mount says
`transport`; from then on, if the digest fits, `chunk`. If it does not, nothing of the layer is served any more.
"""

import hashlib
import logging

from ckptfs.engine.disk import Buffer
from ckptfs.engine.fetch import Fetcher
from ckptfs.engine.schedule import Priority
from ckptfs.engine.threads import in_thread
from ckptfs.errors import IntegrityError
from ckptfs.layers.tar import TarLayer
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.oci import Descriptor

log = logging.getLogger(__name__)


async def hash_layer(fetcher: Fetcher, descriptor: Descriptor, layer: TarLayer) -> None:
    """Read the layer through the node's cache, fetching what is missing; IntegrityError when it is another's."""
    digest = hashlib.new(descriptor.digest.algorithm)
    digests = bytearray()

    def add(data: Buffer) -> None:
        nonlocal digests
        digest.update(data)
        digests += ChunkDigest.BLAKE3.of(data)

    for chunk in layer.chunks():
        await in_thread(add, await fetcher.get(chunk, Priority.BACKGROUND))
    if digest.hexdigest() != descriptor.digest.hex:
        raise IntegrityError(
            f"layer {descriptor.digest} arrived with digest {descriptor.digest.algorithm}:{digest.hexdigest()}",
            hint="what was read of it is not to be trusted; unmount, and ask the registry's operator",
        )
    layer.digests = bytes(digests)  # what is evicted and fetched again has not been hashed with the rest
    log.info("layer %s is verified as a whole", descriptor.digest)


async def condemn_layer(fetcher: Fetcher, number: int, layer: TarLayer, error: IntegrityError) -> None:
    """It is another's. Who reads it hears of that first: nobody is to wait for a chunk that is being dropped."""
    fetcher.condemn(number, error)
    await fetcher.discard([chunk.key for chunk in layer.chunks()])
