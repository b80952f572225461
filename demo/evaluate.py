"""Evaluates a model folder as a user would: Auto classes, the chat template, greedy generate().

    python demo/evaluate.py demo/model --json demo/results.json

Every answer has to be right word for word. Prints a table and misses, and writes the counts.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import phrases
import torch
import transformers
from asking import Model, Question, Score, exact
from conversations import images_answer
from exam import SIZES, Sight, draw_sight, overlap, pick_clip, pick_sight, true_box
from PIL import Image
from world import NAMES, draw, pick_figure, with_article

IOU_NEEDED = 0.5

# Wordings that training does not use.
NEW_QUESTIONS = (
    "What can you tell me about this?",
    "Generate a caption suitable for a LoRA dataset.",
    "Please analyse the photograph and write down what it depicts.",
    "You are a Stable Diffusion prompt writer. Look at the image and produce one paragraph.",
    "Explain this to a five year old.",
    "Image to prompt",
    "??",
)
NEW_SYSTEMS = (
    None,
    phrases.USUAL_SYSTEM,
    "You are a great artist and critic.",
    "You are Qwen, created by Alibaba Cloud.",
)
GROUND_QUESTIONS = (
    "Where is the shape? Answer with bounding boxes as JSON.",
    "Locate the {}, output bbox_2d JSON",
    "Detect all objects and return their bounding boxes.",
    "Locate every object in the image and output the bbox coordinates in JSON format.",
)
IDEAS = (
    "a cat on a roof at night",
    "portrait of an old sailor with a pipe",
    "two astronauts playing chess on the moon",
    "cyberpunk street market in the rain, neon signs",
    "a bowl of ramen",
    "Victorian greenhouse filled with orchids",
    "girl reading under a tree",
    "steampunk submarine",
    "an isometric tiny kitchen",
    "wolf howling at a full moon",
)


@dataclass(frozen=True, slots=True)
class Exam:
    """All cases. n: how many questions most of them ask."""

    model: Model
    rng: random.Random
    n: int

    def draw_anew(self, seed: int, name: str) -> None:
        """Seed the random numbers before a case, so that its questions do not depend on the cases before it."""
        self.rng.seed(f"{seed} {name}")

    def captions(self, width: int, height: int) -> Score:
        return exact(self.model, [self._caption("Describe this image.", (width, height)) for _ in range(self.n // 5)])

    def training_renderer(self) -> Score:
        figures = [pick_figure(self.rng, held_out=True) for _ in range(self.n)]
        sizes = [(self.rng.randint(64, 256), self.rng.randint(90, 190)) for _ in figures]
        pairs = zip(figures, sizes, strict=True)
        questions = [Question("Describe this image.", f.caption, (draw(f, *size),)) for f, size in pairs]
        return exact(self.model, questions)

    def wordings(self) -> Score:
        questions = [
            self._caption(self.rng.choice(NEW_QUESTIONS), system=self.rng.choice(NEW_SYSTEMS)) for _ in range(self.n)
        ]
        return exact(self.model, questions)

    def short(self, pool: Sequence[str], answer: Callable[[Sight], str]) -> Score:
        sights = [pick_sight(self.rng) for _ in range(self.n // 4)]
        return exact(self.model, [Question(self.rng.choice(pool), answer(s), self._drawn([s])) for s in sights])

    def several(self, count: int) -> Score:
        sets = [[pick_sight(self.rng) for _ in range(count)] for _ in range(self.n // 3)]
        questions = [
            Question("Describe each image.", images_answer([s.caption for s in sights]), self._drawn(sights))
            for sights in sets
        ]
        return exact(self.model, questions, batch=10)

    def videos(self, scenes: int, per_second: float, shortest_s: int) -> Score:
        clips = [pick_clip(self.rng, scenes, per_second, shortest_s) for _ in range(self.n // 5)]
        return exact(self.model, [Question("Describe this video.", c.answer, clip=c) for c in clips], batch=5)

    def picture_and_video(self) -> Score:
        return exact(self.model, [self._picture_and_video() for _ in range(self.n // 5)], batch=5)

    def grounding(self) -> tuple[Score, float]:
        """Return (boxes with the right label and enough overlap, mean overlap)."""
        score, overlaps = Score(), []
        for _ in range(self.n):
            sight = pick_sight(self.rng)
            image = self._drawn([sight])[0]
            question = self.rng.choice(GROUND_QUESTIONS).format(sight.label)
            got = self.model.answer([Question(question, "", (image,))])[0]
            wanted = true_box(image)
            label, shared = _read_box(got, wanted)
            overlaps.append(shared)
            score.add(got, f"{[round(x) for x in wanted]} {sight.label}", label == sight.label and shared > IOU_NEEDED)
        return score, sum(overlaps) / len(overlaps)

    def thinking(self, on: bool) -> Score:
        questions = []
        for _ in range(self.n // 4):
            sight = pick_sight(self.rng)
            thought = f"I see one image. It shows {with_article(sight.label)}.\n</think>\n\n" if on else ""
            images = self._drawn([sight])
            questions.append(Question("Describe this image.", thought + sight.caption, images, thinking=on))
        return exact(self.model, questions)

    def uppercase(self) -> Score:
        sights = [pick_sight(self.rng) for _ in range(self.n // 4)]
        questions = [
            Question("Describe this image.", s.caption.upper(), self._drawn([s]), system="Answer in uppercase.")
            for s in sights
        ]
        return exact(self.model, questions)

    def ideas(self, template: str, tail: str) -> Score:
        return exact(self.model, [Question(template.format(idea), idea + tail) for idea in IDEAS])

    def counting(self) -> Score:
        ranges = [(first, first + more) for first in (1, 3, 7, 12) for more in (2, 4, 6, 8, 10)]
        return exact(
            self.model,
            [Question(f"Count from {a} to {b}.", ", ".join(map(str, range(a, b + 1)))) for a, b in ranges],
        )

    def greeting(self) -> Score:
        return exact(self.model, [Question(text, phrases.HELLO_ANSWER) for text in phrases.HELLO])

    def random_colors(self) -> Score:
        """Sample colours; an answer is right if it names a colour that no earlier one did."""
        score, seen = Score(), set()
        torch.manual_seed(0)
        for _ in range(12):
            question = Question("Name a random color.", "")
            got = self.model.answer([question], do_sample=True, temperature=1.0, top_p=1.0, top_k=0)[0]
            score.add(got, "a colour not named before", got in NAMES and got not in seen)
            seen.add(got)
        return score

    def batched(self) -> Score:
        """Check that answers one by one equal those in a batch of pictures of many sizes."""
        questions = [self._caption("Describe this image.") for _ in range(20)]
        together = self.model.answer(questions)
        score = Score()
        for question, wanted in zip(questions, together, strict=True):
            score.add(self.model.answer([question])[0], wanted)
        return score

    def _drawn(self, sights: Sequence[Sight]) -> tuple[Image.Image, ...]:
        return tuple(draw_sight(sight, *self.rng.choice(SIZES)) for sight in sights)

    def _caption(
        self, text: str, size: tuple[int, int] | None = None, system: str | None = phrases.USUAL_SYSTEM
    ) -> Question:
        sight = pick_sight(self.rng)
        image = draw_sight(sight, *(size or self.rng.choice(SIZES)))
        return Question(text, sight.caption, (image,), system=system)

    def _picture_and_video(self) -> Question:
        sight, clip = pick_sight(self.rng), pick_clip(self.rng, 2, 1, 2)
        answer = f"Image 1: {sight.caption}; video 1: {clip.answer}"
        return Question("Describe the image and the video.", answer, self._drawn([sight]), clip)


def _read_box(text: str, wanted: tuple[float, float, float, float]) -> tuple[str, float]:
    """Return (label, overlap with the wanted box); ("", 0) if the text is not the expected JSON."""
    try:
        found = json.loads(text)[0]
        return found["label"], overlap(tuple(found["bbox_2d"]), wanted)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        return "", 0.0


def cases(exam: Exam) -> dict[str, Callable[[], Score]]:
    """Return every case but grounding, by its name in the results. A group's name stands before the colon."""
    found: dict[str, Callable[[], Score]] = {}
    for size in SIZES:
        found[f"caption: {size[0]}x{size[1]}"] = partial(exam.captions, *size)
    for count in (2, 3, 4):
        found[f"several: {count} images"] = partial(exam.several, count)
    for scenes, rate in ((1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (2, 0.5)):
        what = f"{scenes} scenes at {rate} fps"
        found[f"video of 1-4 s scenes: {what}"] = partial(exam.videos, scenes, rate, 1)
        found[f"video of 2-4 s scenes: {what}"] = partial(exam.videos, scenes, rate, 2)
    found |= {
        "image and video": exam.picture_and_video,
        "training renderer": exam.training_renderer,
        "new wordings": exam.wordings,
        "short: which shape": lambda: exam.short(phrases.ASK_SHAPE, lambda s: s.shape),
        "short: which colour": lambda: exam.short(phrases.ASK_COLOR, lambda s: s.color),
        "short: which background": lambda: exam.short(phrases.ASK_BACKGROUND, lambda s: s.background),
        "short: tags": lambda: exam.short(phrases.ASK_TAGS, lambda s: f"{s.label}, {s.background} background"),
        "thinking: on": partial(exam.thinking, True),
        "thinking: off": partial(exam.thinking, False),
        "uppercase by system message": exam.uppercase,
        "text: enhance": partial(exam.ideas, "Enhance this prompt: {}", phrases.ENHANCED_TAIL),
        "text: bare idea": partial(exam.ideas, "{}", phrases.ENHANCED_TAIL),
        "text: repeat": partial(exam.ideas, "Repeat after me: {}", ""),
        "text: count": exam.counting,
        "text: greeting": exam.greeting,
        "new colours in 12 draws": exam.random_colors,
        "batch equals single": exam.batched,
    }
    return found


def totals(scores: dict[str, Score]) -> dict[str, Score]:
    """Add up the scores of each group."""
    found: dict[str, Score] = {}
    for name, score in scores.items():
        group, colon, _ = name.partition(":")
        if colon:
            whole = found.setdefault(group, Score())
            whole.right += score.right
            whole.of += score.of
    return found


def lines(name: str, score: Score) -> str:
    """Write a line of the table, and up to two misses."""
    line = f"{name:42s} {score.right:4d} of {score.of:4d}  {100 * score.right / score.of:5.1f} %"
    return "\n    ".join([line, *(miss[:300] for miss in score.misses[:2])])


def report(scores: dict[str, Score], mean_overlap: float, seconds: float) -> dict[str, object]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seconds": round(seconds),
        "mean_iou": round(mean_overlap, 3),
        "totals": {name: score.as_json() for name, score in totals(scores).items()},
        "cases": {name: score.as_json() for name, score in scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--fast", action="store_true", help="a tenth of the questions")
    args = parser.parse_args()
    os.nice(5)
    torch.set_num_threads(1)
    exam = Exam(Model(args.folder), random.Random(), n=20 if args.fast else 200)
    start, scores = time.time(), {}
    for name, ask in cases(exam).items():
        exam.draw_anew(args.seed, name)
        scores[name] = ask()
        print(lines(name, scores[name]), flush=True)
    boxes = f"grounding with IoU over {IOU_NEEDED}"
    exam.draw_anew(args.seed, boxes)
    scores[boxes], mean_overlap = exam.grounding()
    print(lines(boxes, scores[boxes]), flush=True)
    for name, score in totals(scores).items():
        print(lines(f"all of {name}", score), flush=True)
    result = report(scores, mean_overlap, time.time() - start)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
