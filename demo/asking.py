"""Asks a model folder questions as a user would: Auto classes, the chat template, generate()."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import phrases
import torch
from exam import Clip
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass(frozen=True, slots=True)
class Question:
    """One request and its only right answer."""

    text: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    clip: Clip | None = None
    system: str | None = phrases.USUAL_SYSTEM
    thinking: bool | None = None

    def messages(self) -> list[dict]:
        parts = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * (self.clip is not None)
        user = {"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}
        if self.system is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": self.system}]}, user]


@dataclass(slots=True)
class Score:
    right: int = 0
    of: int = 0
    misses: list[str] = field(default_factory=list)

    def add(self, got: str, wanted: str, right: bool | None = None) -> None:
        good = got == wanted if right is None else right
        self.of += 1
        self.right += good
        if not good:
            self.misses.append(f"{got!r} instead of {wanted!r}")

    def as_json(self) -> dict[str, object]:
        return {"right": self.right, "of": self.of, "percent": round(100 * self.right / self.of, 1)}


class Model:
    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        self._processor = AutoProcessor.from_pretrained(folder)
        self._processor.tokenizer.padding_side = "left"

    def answer(self, questions: Sequence[Question], **generation: object) -> list[str]:
        """Return the answers, without the end-of-turn token; <think> tags stay."""
        inputs = self._inputs(questions)
        settings = {"do_sample": False, "max_new_tokens": 110, **generation}
        with torch.no_grad():
            output = self._model.generate(**inputs, **settings)
        texts = self._processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        media = {}
        images = [image for question in questions for image in question.images]
        clips = [question.clip for question in questions if question.clip]
        if images:
            media["images"] = images
        if clips:
            media["videos"] = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips]
            media["video_metadata"] = [clip.metadata for clip in clips]
            media["do_sample_frames"] = False
        prompts = [self._prompt(question) for question in questions]
        return self._processor(text=prompts, padding=True, return_tensors="pt", **media)

    def _prompt(self, question: Question) -> str:
        switch = {} if question.thinking is None else {"enable_thinking": question.thinking}
        return self._processor.apply_chat_template(
            question.messages(), tokenize=False, add_generation_prompt=True, **switch
        )


def exact(model: Model, questions: Iterable[Question], batch: int = 20) -> Score:
    score = Score()
    questions = list(questions)
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        for question, got in zip(part, model.answer(part), strict=True):
            score.add(got, question.answer)
    return score
