"""Finds the times of a film's frames, and reads the frames that are asked for, without holding others in memory."""

from __future__ import annotations

import io
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..log import log
from .opening import open_film
from .packets import Check, Decoder, MissedError, film_stream, packets

# Frames a second that FFmpeg assumes for raw streams without a frame rate.
USUAL_RATE = 25
# A film of fewer frames is decoded whole: seeking would save little.
FEW_FRAMES = 300
# A time stamp that is earlier than the one before by more is a new beginning, and not a frame out of order.
OUT_OF_ORDER_S = 1.0
# If time stamps may begin anew, as in recordings of television, a longer step is a new beginning, as in FFmpeg.
LONGEST_STEP_S = 10.0
_MAY_BEGIN_ANEW = 0x200  # AVFMT_TS_DISCONT

Source = str | io.BytesIO


@dataclass(frozen=True, slots=True)
class Timeline:
    """The frames of a film in the order in which they are shown.

    Args:
        times_s: (frames,) float64, rising, by the clock of the file.
        end_s: when the last frame ends.
        origin_s: what a player calls 0 s.
        places: rising time stamps of the same frames, in the stream's unit; their numbers if counted.
        keys: (K, 2) int64, rising: time stamp and place to seek of each frame from which decoding can begin; empty if
            counted.
        counted: the file has no time stamps to go by.
        lost: how many more frames there would be if they could be decoded; known only if counted.
    """

    times_s: np.ndarray
    end_s: float
    origin_s: float
    places: Sequence[int]
    keys: Any = ()
    counted: bool = False
    lost: int = 0


def read_timeline(film: str, source: Source, check: Check) -> Timeline:
    """Read the times from the packets' time stamps; if these cannot be trusted, decode everything and count frames.

    Args:
        film: the film's name, for the log.
        check: called at every packet; raises to cancel.

    Raises:
        av.FFmpegError, OSError: the file cannot be opened.
    """
    with open_film(source) as container:
        stream = film_stream(container)
        found = _read_stamps(container, stream, check)
        start, unit = container.start_time, float(stream.time_base or 0)
    stamps = np.sort(np.array(found.stamps, np.int64))
    places, times = array("q", stamps.tobytes()), stamps * unit
    if not found.trusted or (np.diff(times) <= 0).any():
        return _count_frames(film, source, check)
    if not len(times):
        return Timeline(times, 0.0, 0.0, places)
    first, last = float(times[0]), float(times[-1])
    step = found.last[1] * unit or (last - first) / max(1, len(times) - 1)
    origin = first if start is None else min(first, start / 1e6)
    keys = np.array(found.keys, np.int64).reshape(-1, 2)
    return Timeline(times, last + step, origin, places, keys[np.lexsort((keys[:, 1], keys[:, 0]))])


@dataclass(slots=True)
class _Stamps:
    """Time stamps of the packets, before any is decoded. There may be millions, so they are numbers and not objects."""

    stamps: array[int] = field(default_factory=lambda: array("q"))
    # Two numbers for each key frame: its time stamp, and where to seek.
    keys: array[int] = field(default_factory=lambda: array("q"))
    # Time stamp and duration of the frame that is shown last.
    last: tuple[int, int] = (-(1 << 63), 0)
    trusted: bool = True


def _read_stamps(container: Any, stream: Any, check: Check) -> _Stamps:
    found = _Stamps()
    # AVI keeps no times of presentation. FFmpeg guesses them, and is wrong where frames are stored out of order.
    if "avi" in container.format.name.split(",") and stream.codec_context.has_b_frames:
        found.trusted = False
    longest = _longest_step(container) / float(stream.time_base or 1)
    before = None
    for packet in packets(container, stream, check):
        # An edit list may cut off the beginning, which is then decoded but not shown.
        if packet.is_discard:
            continue
        leaps = None not in (before, packet.dts) and not 0 <= packet.dts - before <= longest
        before = packet.dts
        if packet.pts is None or leaps:
            found.trusted = False
            continue
        found.stamps.append(packet.pts)
        found.last = max(found.last, (packet.pts, packet.duration or 0))
        if packet.is_keyframe:
            found.keys.extend((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
    return found


def _longest_step(container: Any) -> float:
    """Return the longest step between two frames, in seconds; a longer one is a new beginning."""
    return LONGEST_STEP_S if int(container.format.flags) & _MAY_BEGIN_ANEW else float("inf")


def _count_frames(film: str, source: Source, check: Check, threads: bool = True) -> Timeline:
    import av

    with open_film(source) as container:
        stream = film_stream(container)
        unit, decoder = float(stream.time_base or 0), Decoder(container, stream, check, threads)
        stamps, lost = array("d"), array("q")
        try:
            for frame in decoder.frames():
                stamps.append(np.nan if frame.pts is None else frame.pts * unit)
                lost.append(decoder.failed + decoder.corrupt)
        except av.FFmpegError:
            if not threads:
                raise
        else:
            step = 1 / _rate(film, stream, bool(np.isnan(stamps).all()))
            times = _clock(stamps, lost, step, _longest_step(container))
            end = float(times[-1]) + step if len(times) else 0.0
            missing = decoder.lost(decoder.fed, len(times))
            return Timeline(times, end, 0.0, range(len(times)), counted=True, lost=missing)
    return _count_frames(film, source, check, threads=False)


def _rate(film: str, stream: Any, is_raw: bool) -> float:
    """Return the stream's frames a second."""
    # In a stream without times, guessed_rate may be FFmpeg's assumption.
    rate = stream.codec_context.framerate if is_raw else stream.guessed_rate
    if rate:
        return float(rate)
    log.warning("%s does not say how fast it is played: %d frames a second are assumed", film, USUAL_RATE)
    return USUAL_RATE


def _clock(stamps: Sequence[float], lost: Sequence[int], step: float, longest: float) -> np.ndarray:
    """Return each frame's seconds from the first one. Time stamps may be missing (NaN), out of order, or begin anew.

    Args:
        lost: how many frames were lost before each frame.
        step: seconds from a frame to the next one, if no time stamp tells.
        longest: a longer step, in seconds, is a new beginning.
    """
    known = np.array(stamps, np.float64)
    known = known[~np.isnan(known)]
    counted = (np.arange(len(stamps)) + np.array(lost, np.int64)) * step
    if not len(known) or known.min() == known.max():
        return counted - counted[:1]
    times = np.empty(len(stamps))
    shift = latest = 0.0
    for number, stamp in enumerate(stamps):
        usual = latest + (counted[number] - counted[number - 1] if number else 0.0)
        time = usual if np.isnan(stamp) else stamp + shift
        if number == 0 or not -OUT_OF_ORDER_S <= time - latest <= longest:
            shift, time = shift + usual - time, usual
        times[number] = time
        latest = max(latest, time)
    times.sort()
    steps = np.diff(times)
    usual = float(np.median(steps[steps > 0]))
    for number in range(1, len(times)):
        # Two frames are never shown at once: one of their time stamps is wrong.
        if times[number] <= times[number - 1] + usual / 100:
            times[number] = times[number - 1] + usual
    return times - times[0]


class FrameReader:
    """Reads frames of a film by their numbers, in rising order.

    Args:
        check: called at every packet; raises to cancel.
    """

    def __init__(self, source: Source, timeline: Timeline, check: Check) -> None:
        self._source, self._timeline, self._check = source, timeline, check
        self._threads = True
        self._seeks = len(timeline.places) > FEW_FRAMES and len(timeline.keys) > 0
        self._shown = -(1 << 63)
        # How many of the frames that had to be decoded could not be.
        self.lost = timeline.lost

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[float, Any]]:
        """Yield (seconds by the clock of the file, frame) for each number of a frame.

        A lost frame is replaced by the next one, unless that is shown anyway.
        """
        import av

        waiting = deque(self._timeline.places[number] for number in numbers)
        while waiting:
            with open_film(self._source) as container:
                try:
                    yield from self._pass(container, waiting)
                except MissedError:
                    self._seeks = False
                except av.FFmpegError:
                    # Try again from the first missing frame, packet by packet.
                    if not self._threads:
                        raise
                    self._threads = False

    def _pass(self, container: Any, waiting: deque[int]) -> Iterator[tuple[float, Any]]:
        """Go through the film once, until no number is waiting or no frame is left."""
        run: _Run | None = None
        lost = 0
        while waiting:
            key = self._key(waiting[0])
            if run is None or (key and key[0] > run.reached):
                lost += run.lost(self._timeline.places) if run else 0
                run = self._begin(container, key)
            found = run.reach(waiting[0])
            if self._seeks and (found is None or (found[0] != waiting[0] and not run.decoder.failed)):
                raise MissedError
            if found is None or found[0] <= self._shown:
                waiting.clear()
                break
            self._shown, frame = found
            while waiting and (waiting[0] <= self._shown or run.ended):
                waiting.popleft()
            yield self._time(self._shown), frame
        if run is not None and not self._timeline.counted:
            self.lost = lost + run.lost(self._timeline.places)

    def _time(self, place: int) -> float:
        """Return a frame's time in seconds. Its time stamp may be one that no packet has."""
        timeline = self._timeline
        return float(np.interp(place, timeline.places, timeline.times_s))

    def _key(self, place: int) -> tuple[int, int] | None:
        """Return the key frame from which to decode the frame; None to decode from the first packet."""
        keys = self._timeline.keys
        before = bisect_right(keys, place, key=lambda stamps: stamps[0]) if self._seeks else 0
        return (int(keys[before - 1][0]), int(keys[before - 1][1])) if before else None

    def _begin(self, container: Any, key: tuple[int, int] | None) -> _Run:
        import av

        stream = film_stream(container)
        decoder = Decoder(container, stream, self._check, self._threads)
        if key is None:
            first = self._timeline.places[0]
            return _Run(decoder, first, decoder.frames(), self._timeline.counted)
        try:
            container.seek(key[1], stream=stream)
        except av.FFmpegError as error:
            raise MissedError from error
        return _Run(decoder, key[0], decoder.frames(key[0]), self._timeline.counted)


class _Run:
    """The frames of a film one after the other, from one place on."""

    def __init__(self, decoder: Decoder, first: int, frames: Iterator[Any], counted: bool) -> None:
        self.decoder = decoder
        self._first = first
        numbered = enumerate(frames) if counted else ((frame.pts, frame) for frame in frames)
        self._frames = ((place, frame) for place, frame in numbered if place is not None and place >= first)
        self._shown = 0
        self.reached = first - 1
        self.ended = False

    def reach(self, goal: int) -> tuple[int, Any] | None:
        """Return the first frame at `goal` or later, else the last one of the film; None if no frame is left."""
        last = None
        for place, frame in self._frames:
            self._shown += 1
            self.reached = place
            last = place, frame
            if place >= goal:
                return last
        self.ended = True
        return last

    def lost(self, places: Sequence[int]) -> int:
        """Return how many of the frames up to here could not be decoded."""
        end = len(places) if self.ended else bisect_right(places, self.reached)
        return self.decoder.lost(end - bisect_left(places, self._first), self._shown)
