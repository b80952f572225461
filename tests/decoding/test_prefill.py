"""How far the host is ahead of a GPU in a prompt. The GPU is pretended: its events write down what happens to them."""

from types import SimpleNamespace

import pytest
import torch

from qwenvl.decoding.prefill import LAYERS_AHEAD, LONG_PROMPT, checked

LAYERS = 12


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = SimpleNamespace(type="cuda")


class Stack(torch.nn.Module):
    """Layers that only pass on what they get."""

    def __init__(self):
        super().__init__()
        self.text = torch.nn.Module()
        self.text.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))  # on no CPU

    def forward(self, tokens):
        hidden = torch.zeros(1, tokens, 2).as_subclass(OnGpu)
        for layer in self.text.layers:
            hidden = layer(hidden)


@pytest.fixture
def events(monkeypatch):
    told = []

    class Event:
        def __init__(self, blocking):
            assert blocking, "waiting must not burn a core"
            self.number = sum(kind == "sent" for kind, _ in told)

        def record(self, stream):
            told.append(("sent", self.number))

        def synchronize(self):
            told.append(("waited", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return told


def test_a_long_prompt_is_few_layers_ahead_so_that_a_cancel_ends_it(events):
    with checked(model := Stack(), lambda: None):
        model(LONG_PROMPT)
    sent = 0
    for kind, number in events:
        if kind == "sent":
            sent += 1
        else:
            assert number == sent - 1 - LAYERS_AHEAD
    assert [number for kind, number in events if kind == "waited"] == list(range(LAYERS - LAYERS_AHEAD))


def test_a_cancel_at_a_layer_sends_no_more(events):
    def check():
        if len([1 for kind, _ in events if kind == "sent"]) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), checked(model := Stack(), check):
        model(LONG_PROMPT)
    assert events == [("sent", 0), ("sent", 1), ("sent", 2)]


def test_a_short_prompt_waits_for_nothing(events):
    with checked(model := Stack(), lambda: None):
        model(LONG_PROMPT - 1)
    assert events == []


def test_after_the_prompt_no_step_is_looked_at(events):
    looks = []
    with checked(model := Stack(), lambda: looks.append(1)) as after_the_prompt:
        after_the_prompt()
        model(LONG_PROMPT)
    assert not looks and not events
