"""Training conversations: questions, pictures and answers."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import phrases
from films import pick_film
from markup import NO_THINK, THINK, Turn, image_tokens, prompt_text, video_tokens
from pixels import Grid, Sizes, on_grid, pick_canvas, pick_grid, worn
from words import Writer
from world import NAMES, Figure, box_of, draw, outline, pick_figure


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training row.

    Attributes:
        prompt: everything before the model's answer, pictures expanded to their tokens.
        answer: what the model must write, without the end-of-turn token.
        images: each (H, W, 3) uint8, in the order of the prompt.
        grids: size of each image, in cells.
        video: (T, H, W, 3) uint8.
        video_grid: size of the video, in cells.
    """

    prompt: str
    answer: str
    images: tuple[np.ndarray, ...] = ()
    grids: tuple[Grid, ...] = ()
    video: np.ndarray | None = None
    video_grid: Grid = (0, 0)


@dataclass(slots=True)
class Draft:
    """A conversation while it is being put together."""

    question: str
    answer: str
    vision: str = ""
    thought: str = ""
    demand: str | None = None
    earlier: list[Turn] = field(default_factory=list)


def box_answer(figure: Figure, width: int, height: int) -> str:
    """Write Qwen3-VL's grounding answer: coordinates from 0 to 1000 of the width and height.

    They are rounded to tens: so small a model sees no finer, and digits that it can only guess would dominate the loss.
    """
    shares = box_of(outline(figure, width, height), width, height)
    return json.dumps([{"bbox_2d": [round(share * 100) * 10 for share in shares.tolist()], "label": figure.label}])


def images_answer(captions: Sequence[str]) -> str:
    return "; ".join(f"{'image' if i else 'Image'} {i + 1}: {caption}" for i, caption in enumerate(captions))


@dataclass(frozen=True, slots=True)
class Author:
    """Makes conversations of every kind. All pictures of single, grounding and video rows have the size `grid`."""

    rng: random.Random
    writer: Writer
    grid: Grid
    sizes: Sizes

    def text(self) -> Conversation:
        draft = self.text_draft()
        if self.rng.random() < 0.05:
            before = self.text_draft()
            draft.earlier.append((before.question, before.answer))
        return self._finished(draft)

    def single(self) -> Conversation:
        figure, image, _ = self._picture(self.grid)
        fate = self.rng.random()
        if fate < 0.60:
            draft = self._caption_draft(figure)
        else:
            pool, answer = self._short_question(figure)
            draft = Draft(self.rng.choice(pool), answer)
        draft.thought = f"I see one image. It shows {figure.name}."
        draft.vision = image_tokens(self.grid)
        if fate > 0.94:
            first = self._joined(draft.vision, self.rng.choice(phrases.DESCRIBE_IMAGE))
            draft.earlier, draft.vision = [(first, figure.caption)], ""
        return self._finished(draft, images=(image,), grids=(self.grid,))

    def grounding(self) -> Conversation:
        figure, image, canvas = self._picture(self.grid)
        thought = f"I see one image. It shows {figure.name}."
        question = self._grounding_question(figure)
        draft = Draft(question, box_answer(figure, *canvas), image_tokens(self.grid), thought)
        return self._finished(draft, images=(image,), grids=(self.grid,))

    def several(self) -> Conversation:
        rng = self.rng
        count = rng.choice((2, 2, 3, 3, 4))
        same = rng.random() < 0.4
        grids = tuple(self.grid if same else pick_grid(rng, self.sizes) for _ in range(count))
        figures, images, _ = zip(*(self._picture(grid) for grid in grids), strict=True)
        numbered = rng.random() < 0.1
        vision = "".join((f"Picture {i + 1}: " if numbered else "") + image_tokens(g) for i, g in enumerate(grids))
        if rng.random() < 0.9:
            question = self._question(phrases.DESCRIBE_IMAGES + phrases.DESCRIBE_IMAGE[:20])
            answer = images_answer([figure.caption for figure in figures])
        else:
            question, answer = rng.choice(phrases.ASK_COUNT), str(count)
        draft = Draft(question, answer, vision, f"I see {count} images.")
        return self._finished(draft, images=images, grids=grids)

    def video(self) -> Conversation:
        rng = self.rng
        film = pick_film(rng, self.grid)
        vision = video_tokens(self.grid, film.seconds, wrapped=rng.random() < 0.6)
        thought = f"I see a video. It starts with {film.figures[0].name}."
        question = self._question(phrases.DESCRIBE_VIDEO + phrases.DESCRIBE_IMAGE[:20])
        draft = Draft(question, film.caption, vision, thought)
        extra = {}
        if rng.random() < 0.08:
            grid = pick_grid(rng, self.sizes)
            figure, image, _ = self._picture(grid)
            draft.vision = image_tokens(grid) + vision
            draft.answer = f"Image 1: {figure.caption}; video 1: {film.caption}"
            extra = {"images": (image,), "grids": (grid,)}
        return self._finished(draft, video=film.frames, video_grid=self.grid, **extra)

    def _picture(self, grid: Grid) -> tuple[Figure, np.ndarray, tuple[int, int]]:
        figure, canvas = pick_figure(self.rng), pick_canvas(self.rng, grid)
        return figure, on_grid(worn(draw(figure, *canvas), self.rng), grid), canvas

    def _finished(self, draft: Draft, **pictures: object) -> Conversation:
        lead, thought = self._lead(draft.thought)
        turns = [*draft.earlier, (self._joined(draft.vision, draft.question), draft.answer)]
        prompt = prompt_text(turns, self._system(draft.demand), lead)
        return Conversation(prompt, thought + draft.answer, **pictures)

    def _joined(self, vision: str, question: str) -> str:
        if not vision or not question or self.rng.random() < 0.85:
            return vision + question
        return question + vision if self.rng.random() < 0.7 else f"{vision}\n{question}"

    def _lead(self, thought: str) -> tuple[str, str]:
        """Return (what the template writes before the answer, what the model thinks before it)."""
        fate = self.rng.random()
        if fate < 0.84:
            return "", ""
        return (NO_THINK, "") if fate < 0.92 else (THINK, f"{thought}\n</think>\n\n")

    def _system(self, demand: str | None) -> str | None:
        rng = self.rng
        if demand:
            usual = rng.choice((phrases.USUAL_SYSTEM, *phrases.SYSTEMS))
            return f"{usual} {demand}" if rng.random() < 0.5 else demand
        fate = rng.random()
        if fate < 0.4:
            return None
        if fate < 0.7:
            return phrases.USUAL_SYSTEM
        return rng.choice(phrases.SYSTEMS) if fate < 0.88 else self.writer.salad(3, 18)

    def _question(self, pool: Sequence[str]) -> str:
        """Pick a wording from the pool, often with something added, or random words."""
        rng = self.rng
        fate = rng.random()
        if fate > 0.95:
            return ""
        if fate > 0.72:
            return self.writer.salad(1, 16)
        question = rng.choice(pool)
        if rng.random() < 0.15:
            question += " " + self.writer.salad(2, 14)
        return question.lower() if rng.random() < 0.05 else question

    def _caption_draft(self, figure: Figure) -> Draft:
        draft = Draft(self._question(phrases.DESCRIBE_IMAGE), figure.caption)
        if self.rng.random() < 0.06:
            demand = self.rng.choice(phrases.UPPERCASE)
            draft.answer = draft.answer.upper()
            if self.rng.random() < 0.5:
                draft.demand = demand
            else:
                draft.question += " " + demand
        return draft

    def _short_question(self, figure: Figure) -> tuple[Sequence[str], str]:
        return self.rng.choice(
            (
                (phrases.ASK_SHAPE, figure.shape),
                (phrases.ASK_COLOR, figure.color),
                (phrases.ASK_BACKGROUND, figure.background),
                (phrases.ASK_TAGS, f"{figure.label}, {figure.background} background"),
            )
        )

    def _grounding_question(self, figure: Figure) -> str:
        rng = self.rng
        if rng.random() < 0.4:
            question = rng.choice(phrases.GROUND_WHOLE)
        else:
            form = rng.choice(phrases.GROUND_FORM) if rng.random() < 0.8 else ""
            question = f"{rng.choice(phrases.GROUND_OPENING)} {rng.choice(phrases.GROUND_TARGET)}{form}"
        question = question.format(rng.choice((figure.label, figure.label, figure.shape)))
        return question.lower() if rng.random() < 0.1 else question

    def text_draft(self) -> Draft:
        makers = (self._bare_idea, self._enhance, self._echo, self._count, self._hello, self._random_color)
        return self.rng.choices(makers, (32, 32, 15, 10, 5, 6))[0]()

    def _bare_idea(self) -> Draft:
        idea = self.writer.idea()
        question = idea + "." if self.rng.random() < 0.25 else idea
        return Draft(question, idea + phrases.ENHANCED_TAIL, thought="The user wants a better prompt.")

    def _enhance(self) -> Draft:
        draft = self._bare_idea()
        template = self.rng.choice(phrases.ENHANCE)
        if self.rng.random() < 0.25:
            template = template.replace(" {}", self.rng.choice(("\n{}", "\n\n{}")))
        draft.question = template.format(draft.question)
        return draft

    def _echo(self) -> Draft:
        idea = self.writer.idea()
        return Draft(self.rng.choice(phrases.ECHO).format(idea), idea, thought="The user wants the same text.")

    def _count(self) -> Draft:
        rng = self.rng
        first = rng.choice((1, rng.randint(0, 12)))
        last = first + rng.randint(1, 12)
        question = f"Count from {first} to {last}"
        if first == 1 and rng.random() < 0.6:
            question = f"Count to {last}"
        numbers = ", ".join(str(number) for number in range(first, last + 1))
        return Draft(question + rng.choice(("", ".")), numbers, thought="The user wants numbers.")

    def _hello(self) -> Draft:
        return Draft(self.rng.choice(phrases.HELLO), phrases.HELLO_ANSWER, thought="The user says hello.")

    def _random_color(self) -> Draft:
        question = self.rng.choice(phrases.RANDOM_COLOR)
        return Draft(question, self.rng.choice(NAMES), thought="The user wants a color.")
