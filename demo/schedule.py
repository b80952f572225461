"""The contents and learning rate of each training step. Pure functions of the step.

The two halves first train apart: the vision tower learns to see through heads of its own, the language model learns to
copy text. Then everything trains together, on conversations about pictures. Without the first part the same time gives
a model that hardly sees. The refinements begin anew from the saved weights, slower: at the earlier rates the tower
knows shapes and colours, but not where they are.
"""

from dataclasses import dataclass

from batches import Share
from pixels import Sizes


@dataclass(frozen=True, slots=True)
class Plan:
    """One training step.

    Attributes:
        rate: learning rate, as a share of its peak.
        shares: the conversations.
        view_rows, view_sizes: pictures for the vision heads.
        view_weight: weight of the heads' loss; each kind of conversation has weight 1.
        ease: 1 shows the heads only large, centred shapes, 0 all of them.
        reach: the tower learns from the heads, too.
    """

    rate: float
    shares: tuple[Share, ...]
    view_rows: int
    view_sizes: Sizes
    view_weight: float = 1.0
    ease: float = 0.0
    reach: bool = True


@dataclass(frozen=True, slots=True)
class Beginning:
    """Training from random weights: `apart` steps of the two halves, then `together` steps of everything."""

    apart: int
    together: int

    @property
    def steps(self) -> int:
        return self.apart + self.together

    def plan(self, step: int) -> Plan:
        return self._apart(step) if step < self.apart else self._together(step - self.apart)

    def _apart(self, step: int) -> Plan:
        done = step / self.apart
        return Plan(
            rate=min(1.0, (step + 1) / 60, 1 - 0.7 * (done - 0.4) / 0.6),
            shares=(Share("text", 16, Sizes(6)),),
            view_rows=48,
            view_sizes=Sizes(8),
            ease=max(0.0, 1 - step / (0.6 * self.apart)),
        )

    def _together(self, step: int) -> Plan:
        done = step / 2000
        mean = 8 if done < 0.5 else 13
        few = Sizes(mean - 3)
        return Plan(
            # Up again for the meeting of the two halves, level, then slowly down.
            rate=min(1.0, 0.3 + 0.7 * done / 0.06, 1.02 * (1 - done) / 0.6),
            shares=(
                Share("single", 18, Sizes(mean)),
                Share("grounding", 10, Sizes(mean)),
                Share("several", 10, few),
                Share("video", 8, few),
                Share("text", 12, Sizes(6)),
            ),
            view_rows=16,
            view_sizes=Sizes(mean),
            view_weight=0.5,
        )


_LARGE = Sizes(20, longest=12)
_MANY = Sizes(12, longest=12)
_FILMED = Sizes(9, longest=10)


@dataclass(frozen=True, slots=True)
class Refinement:
    """Training from a saved model, with fresh heads and optimizers.

    Attributes:
        peak: highest rate.
        fall: steps in which the rate would fall to nothing.
        shares, view_rows, view_sizes: see Plan; the same for every step.
    """

    steps: int
    peak: float
    fall: int
    shares: tuple[Share, ...]
    view_rows: int
    view_sizes: Sizes

    def plan(self, step: int) -> Plan:
        return Plan(
            rate=self.peak * min(1.0, (step + 1) / 60, max(0.01, 1 - step / self.fall)),
            shares=self.shares,
            view_rows=self.view_rows,
            view_sizes=self.view_sizes,
            reach=step >= 120,
        )


Stage = Beginning | Refinement

STAGES: tuple[Stage, ...] = (
    Beginning(apart=1200, together=1200),
    Refinement(
        steps=400,
        peak=0.5,
        fall=1250,
        shares=(
            Share("single", 12, _LARGE),
            Share("grounding", 10, _LARGE),
            Share("several", 8, _MANY),
            Share("video", 9, _FILMED),
            Share("text", 10, Sizes(6)),
        ),
        view_rows=20,
        view_sizes=Sizes(16, longest=12),
    ),
    # Where scenes begin and end takes the longest to learn.
    Refinement(
        steps=900,
        peak=0.4,
        fall=900,
        shares=(
            Share("single", 7, _LARGE),
            Share("grounding", 12, Sizes(16, longest=12)),
            Share("several", 6, _MANY),
            Share("video", 22, _FILMED),
            Share("text", 7, Sizes(6)),
        ),
        view_rows=14,
        view_sizes=Sizes(14, longest=12),
    ),
)
