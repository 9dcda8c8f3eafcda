"""A compact set of the ids that a file has used."""

from hashlib import blake2b


class ChatIds:
    """A compact set of the ids seen so far in a file, about 15 bytes each.

    A hash set whose buckets are packed arrays of 96-bit digests: among a billion ids, the chance
    that two different ones collide is below 1e-11. The number of buckets doubles as they fill.
    """

    _DIGEST_BYTES = 12
    _MAX_MEAN_SIZE = 64  # digests per bucket

    def __init__(self) -> None:
        self._buckets = [bytearray()]
        self._num_ids = 0

    def __len__(self) -> int:
        return self._num_ids

    def claim(self, chat_id: str) -> bool:
        """Add an id; returns False if it was already there."""
        digest = blake2b(chat_id.encode(), digest_size=self._DIGEST_BYTES).digest()
        bucket = self._buckets[self._index(digest)]
        if self._holds(bucket, digest):
            return False
        bucket += digest
        self._num_ids += 1
        if self._num_ids > self._MAX_MEAN_SIZE * len(self._buckets):
            self._double()
        return True

    def _index(self, digest: bytes) -> int:
        return int.from_bytes(digest[:4], "little") & (len(self._buckets) - 1)

    def _holds(self, bucket: bytearray, digest: bytes) -> bool:
        at = bucket.find(digest)
        while at >= 0 and at % self._DIGEST_BYTES:  # a match across two digests
            at = bucket.find(digest, at + 1)
        return at >= 0

    def _double(self) -> None:
        """Split every bucket by the next bit of its digests, one bucket at a time."""
        size, num_old = self._DIGEST_BYTES, len(self._buckets)
        self._buckets += [bytearray() for _ in range(num_old)]
        for number in range(num_old):
            old = bytes(self._buckets[number])
            halves: dict[int, list[bytes]] = {number: [], number + num_old: []}
            for at in range(0, len(old), size):
                digest = old[at : at + size]
                halves[self._index(digest)].append(digest)
            for index, digests in halves.items():
                self._buckets[index] = bytearray().join(digests)
