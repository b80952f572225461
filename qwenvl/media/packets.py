"""Reads and decodes the packets of a film. Damage costs only the damaged frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# After as many failed reads on end, the file counts as ended.
MOST_FAILED_READS = 16
# Packets of all streams: 17 hours of film and sound. A hostile file has one in every few bytes.
MOST_PACKETS = 1 << 22

Check = Callable[[], object]


class MissedError(Exception):
    """Seeking in a film ended at another place than asked for."""


class TooManyPacketsError(ValueError):
    """A film has more packets than MOST_PACKETS."""


def film_stream(container: Any) -> Any:
    """Return the stream of pictures that a player shows, and not a cover; None if the film has no pictures."""
    found = container.streams.video
    return (container.streams.best("video") or found[0]) if found else None


def packets(container: Any, stream: Any, check: Check) -> Iterator[Any]:
    """Yield the stream's packets that are not empty. A packet that cannot be read is passed over.

    Args:
        check: called at every packet of every stream; raises to cancel.

    Raises:
        TooManyPacketsError: there are more than MOST_PACKETS.
    """
    import av

    failed = read = 0
    while failed < MOST_FAILED_READS:
        try:
            # All streams are read: if PyAV passed over the others by itself, that could not be cancelled.
            for packet in container.demux():
                check()
                failed, read = 0, read + 1
                if read > MOST_PACKETS:
                    raise TooManyPacketsError(
                        f"it has more than {MOST_PACKETS:,} packets of pictures and sound: cut it into shorter films"
                    )
                # The decoder takes an empty packet for the end.
                if packet.size and packet.stream_index == stream.index:
                    yield packet
            return
        except av.FFmpegError:
            failed += 1


class Decoder:
    """The frames of a stream, without those that cannot be decoded.

    Args:
        threads: decode several frames at a time. Then an error cannot be traced to its packet, so the first is raised.
    """

    def __init__(self, container: Any, stream: Any, check: Check, threads: bool) -> None:
        self._container, self._stream, self._check, self._strict = container, stream, check, threads
        if not stream.codec_context.is_open:
            stream.thread_type = "AUTO" if threads else "NONE"
        self.fed = self.failed = self.corrupt = 0
        # VP8 has frames that are never shown.
        self._one_each = stream.codec_context.name != "vp8"

    def lost(self, expected: int, shown: int) -> int:
        """Return how many frames could not be decoded, including those that a decoder dropped without an error."""
        return max(self.failed + self.corrupt, expected - shown if self._one_each else 0)

    def frames(self, key: int | None = None) -> Iterator[Any]:
        """Decode from the first packet on, or from the first key frame, which may not be later than `key`.

        Raises:
            MissedError: the first key frame is later than `key`, the time stamp of the one that was sought.
            av.FFmpegError: something is damaged, and threads is set.
        """
        for packet in packets(self._container, self._stream, self._check):
            if key is not None:
                if not packet.is_keyframe:
                    continue
                if packet.pts is None or packet.pts > key:
                    raise MissedError
                key = None
            self.fed += not packet.is_discard
            yield from self._decoded(packet)
        yield from self._decoded(None)

    def _decoded(self, packet: Any) -> Iterator[Any]:
        import av

        try:
            frames = self._stream.decode(packet)
        except av.FFmpegError as error:
            if self._strict or isinstance(error, MemoryError):
                raise
            self.failed += 1
            return
        for frame in frames:
            # Half a frame may be a packet of its own in an interlaced film.
            self._one_each = self._one_each and not frame.interlaced_frame
            # Such a frame is a guess of the decoder, so it is left out.
            if frame.is_corrupt:
                self.corrupt += 1
            else:
                yield frame
