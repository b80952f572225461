"""Trains the demo model from scratch, on CPU cores alone.

    python demo/train.py --out demo/model

The same seed, workers and library versions give the same weights.
"""

import argparse
import json
import logging
import os
import random
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from batches import IGNORED, Batch, Press
from folder import write_model, write_processor
from muon import Muon
from network import HIDDEN, hidden_matrices, make_model, read_model, speed_up
from schedule import STAGES, Plan, Stage
from seeing import Heads, pick_views
from tokenizer import write_tokenizer
from torch.nn import functional
from transformers import AutoTokenizer

log = logging.getLogger("train")

_MUON_RATE = 0.02
_ADAM_RATE = 3e-3
_WEIGHT_DECAY = 0.05
_REPORT_EVERY = 50


@dataclass(frozen=True, slots=True)
class Options:
    """Command-line options.

    Attributes:
        out: the model folder to write.
        first_stage: index of the stage to begin with. Each but stage 0 begins with the model that the one before wrote.
        most_steps: most steps of every stage, to try things out.
        workers: single-threaded processes, one per core.
        seed: seed of all random numbers.
        keep_every: steps between saves of the unfinished model, 0 for none.
    """

    out: Path
    first_stage: int
    most_steps: int
    workers: int
    seed: int
    keep_every: int


class Diary:
    """Collects figures between two reports."""

    def __init__(self) -> None:
        self._figures: dict[str, list[float]] = defaultdict(list)
        self._start_s, self._start_cpu_s = time.time(), time.process_time()

    def note(self, name: str, value: float) -> None:
        self._figures[name].append(value)

    def minutes(self) -> tuple[float, float]:
        """Return minutes since the start: (wall time, CPU time of this process)."""
        return (time.time() - self._start_s) / 60, (time.process_time() - self._start_cpu_s) / 60

    def report(self, step: int) -> None:
        means = {name: sum(values) / len(values) for name, values in sorted(self._figures.items())}
        text = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
        log.info("step %d, %.1f min, %.1f CPU min: %s", step, *self.minutes(), text)
        self._figures.clear()


class Trainer:
    """One of the worker processes. All hold the same weights and average their gradients."""

    def __init__(self, options: Options, number: int, rank: int) -> None:
        self._options, self._rank = options, rank
        self._stage: Stage = STAGES[number]
        self._rng = random.Random(options.seed * 64 + rank + 1000 * number)
        torch.manual_seed(options.seed + number)
        self._tokenizer = AutoTokenizer.from_pretrained(options.out)
        self._press = Press(options.out)
        self._model = read_model(options.out) if number else make_model(self._tokenizer)
        speed_up(self._model)
        self._heads = Heads(HIDDEN)
        self._parameters = [*self._model.parameters(), *self._heads.parameters()]
        self._optimizers = self._make_optimizers()
        self._diary = Diary()

    def run(self) -> None:
        for step in range(min(self._stage.steps, self._options.most_steps)):
            self._step(self._stage.plan(step))
            if self._rank == 0:
                self._after(step + 1)
        if self._rank == 0:
            write_model(self._model, self._tokenizer, self._options.out)
            wall, cpu = self._diary.minutes()
            log.info("%s", json.dumps({"wall_minutes": round(wall, 1), "cpu_minutes_per_worker": round(cpu, 1)}))

    def _make_optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = hidden_matrices(self._model)
        taken = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in self._parameters if id(parameter) not in taken]
        return [
            Muon(matrices, lr=_MUON_RATE, weight_decay=_WEIGHT_DECAY),
            torch.optim.AdamW(rest, lr=_ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def _step(self, plan: Plan) -> None:
        self._look(plan)
        for share in plan.shares:
            self._converse(share.kind, self._press.batch(self._rng, share))
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, peak in zip(self._optimizers, (_MUON_RATE, _ADAM_RATE), strict=True):
            optimizer.param_groups[0]["lr"] = peak * plan.rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _look(self, plan: Plan) -> None:
        views = pick_views(self._rng, plan.view_rows, plan.view_sizes, plan.ease)
        loss, figures = self._heads(self._model.model.visual, views, plan.reach)
        (loss * plan.view_weight).backward()
        for name, value in figures.items():
            self._diary.note(name, value)

    def _converse(self, kind: str, batch: Batch) -> None:
        hidden = self._model.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **batch.pictures
        ).last_hidden_state[:, :-1]
        labels = batch.labels[:, 1:]
        answered = labels != IGNORED
        logits = self._model.lm_head(hidden[answered])
        loss = functional.cross_entropy(logits, labels[answered])
        loss.backward()
        self._diary.note(f"{kind} loss", loss.item())
        self._diary.note(f"{kind} exact", _exact_rows(logits, labels, answered))

    def _average_gradients(self) -> None:
        if self._options.workers == 1:
            return
        flat = torch.cat([_gradient(parameter).flatten() for parameter in self._parameters])
        dist.all_reduce(flat)
        flat /= self._options.workers
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, gradient in zip(self._parameters, flat.split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _after(self, done: int) -> None:
        if done % _REPORT_EVERY == 0:
            self._diary.report(done)
        if self._options.keep_every and done % self._options.keep_every == 0:
            write_model(self._model, self._tokenizer, self._options.out)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def _exact_rows(logits: torch.Tensor, labels: torch.Tensor, answered: torch.Tensor) -> float:
    """Return the share of rows whose answer tokens are all the likeliest ones, so that greedy decoding is right.

    No row is used for training twice, so this is close to a held-out figure.
    """
    wrong = torch.zeros_like(answered)
    wrong[answered] = logits.argmax(-1) != labels[answered]
    return 1 - wrong.any(1).float().mean().item()


def work(rank: int, options: Options, meeting: str) -> None:
    """Run a worker process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    os.nice(5)
    # Operations this small become slower if they are split over threads.
    torch.set_num_threads(1)
    if options.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.workers)
    for number in range(options.first_stage, len(STAGES)):
        Trainer(options, number, rank).run()
        if options.workers > 1:
            dist.barrier()
    if options.workers > 1:
        dist.destroy_process_group()


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes, one per core")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-stage", type=int, default=0, help="go on with this stage from the model in the folder")
    parser.add_argument("--most-steps", type=int, default=1_000_000, help="of every stage, to try things out")
    parser.add_argument("--keep-every", type=int, default=0, help="save the unfinished model every so many steps")
    args = parser.parse_args()
    return Options(args.out, args.first_stage, args.most_steps, args.workers, args.seed, args.keep_every)


def main() -> None:
    options = parse()
    write_tokenizer(options.out)
    write_processor(options.out)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(work, (options, meeting), nprocs=options.workers)


if __name__ == "__main__":
    main()
