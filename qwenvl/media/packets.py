"""The packets of a film, and what is decoded of them: damage costs what is damaged, and no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# A file that cannot be read so many times on end has ended.
MOST_FAILED_READS = 16
# Of all streams together: 17 hours of film and sound. A hostile file has one in every few bytes.
MOST_PACKETS = 1 << 22

Check = Callable[[], object]


class MissedError(Exception):
    """A container has not gone to where it was sent."""


class TooManyPacketsError(ValueError):
    """A film has more packets than are read."""


def film_stream(container: Any) -> Any:
    """The pictures that a player shows, which are not those of a film's cover. None where there are none."""
    found = container.streams.video
    return (container.streams.best("video") or found[0]) if found else None


def packets(container: Any, stream: Any, check: Check) -> Iterator[Any]:
    """All of the stream that hold something. Where one cannot be read, reading goes on behind it.

    Args:
        check: called at every packet, of whatever stream; raises to cancel.

    Raises:
        TooManyPacketsError: there are more than MOST_PACKETS.
    """
    import av

    failed = read = 0
    while failed < MOST_FAILED_READS:
        try:
            # Of all streams: PyAV passes over the others by itself, and nobody could cancel that.
            for packet in container.demux():
                check()
                failed, read = 0, read + 1
                if read > MOST_PACKETS:
                    raise TooManyPacketsError(
                        f"it has more than {MOST_PACKETS:,} packets of pictures and sound: cut it into shorter films"
                    )
                # An empty one would tell the decoder that this is the end.
                if packet.size and packet.stream_index == stream.index:
                    yield packet
            return
        except av.FFmpegError:
            failed += 1


class Decoder:
    """The frames of a stream, without those that cannot be decoded.

    Args:
        threads: several frames at a time. It is not known then which packet an error is of, so the first one is raised.
    """

    def __init__(self, container: Any, stream: Any, check: Check, threads: bool) -> None:
        self._container, self._stream, self._check, self._strict = container, stream, check, threads
        if not stream.codec_context.is_open:
            stream.thread_type = "AUTO" if threads else "NONE"
        self.fed = self.failed = self.corrupt = 0
        # VP8 has frames that are never shown.
        self._one_each = stream.codec_context.name != "vp8"

    def lost(self, expected: int, shown: int) -> int:
        """How many frames could not be decoded: not every decoder calls that an error."""
        return max(self.failed + self.corrupt, expected - shown if self._one_each else 0)

    def frames(self, key: int | None = None) -> Iterator[Any]:
        """From the first packet on; with a key frame's time stamp, from there or from an earlier key frame.

        Raises:
            MissedError: that key frame lies behind.
            av.FFmpegError: with threads, for any damage.
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
            # A guess at what was there, or less.
            if frame.is_corrupt:
                self.corrupt += 1
            else:
                yield frame
