import pytest
import torch

from qwenvl.decoding.kv_cache import KVCache, capacity_for, span_for


@pytest.mark.parametrize("bucket", [capacity_for, span_for])
def test_a_bucket_holds_its_tokens_and_there_are_few_buckets(bucket):
    sizes = {tokens: bucket(tokens) for tokens in range(1, 70_000, 7)}
    assert all(size >= tokens for tokens, size in sizes.items())
    assert len({size for tokens, size in sizes.items() if 32_768 < tokens <= 65_536}) <= 4


def test_a_long_text_takes_at_most_a_quarter_more_than_it_needs():
    for tokens in range(8_193, 70_000, 7):
        assert span_for(tokens) <= capacity_for(tokens) <= 1.25 * tokens + 1


class Layer:
    """As in transformers' cache."""

    def __init__(self, batch, length):
        self.keys, self.values = torch.randn(2, batch, 2, length, 4)


class Cache:
    def __init__(self, batch, length):
        self.layers = [Layer(batch, length) for _ in range(3)]


def test_rows_are_stored_without_their_padding():
    cache, mask = Cache(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = [layer.keys.clone() for layer in cache.layers]
    kv = KVCache(2, 2, 4, 8, torch.float32, torch.device("cpu"))
    kv.fill(cache, mask, torch.tensor([0, 3]))
    for layer in range(3):
        assert torch.equal(kv.keys[layer][0, :, :3], expected[layer][0, :, 2:])
        assert torch.equal(kv.keys[layer][1, :, :5], expected[layer][1])
    assert kv.lens.tolist() == [3, 5]
    assert (kv.bias == 0).sum(-1).flatten().tolist() == [3, 5]
    assert (kv.filled, kv.even) == (5, False)


def test_a_prompt_is_never_stored_twice(monkeypatch):
    """With 32k tokens of a 4B model that would be 5 GB."""
    cache, held = Cache(1, 6), []
    room = KVCache.allocate

    def counted(self):
        held.append(sum(layer.keys is not None for layer in cache.layers))
        return room(self)

    monkeypatch.setattr(KVCache, "allocate", counted)
    KVCache(1, 2, 4, 8, torch.float32, torch.device("cpu")).fill(
        cache, torch.ones(1, 6, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    )
    assert held == [3, 3, 2, 2, 1, 1], "a layer of the cache goes before the next layer of the buffer comes"


def test_a_larger_one_holds_what_the_smaller_one_held_and_empties_it():
    cache = Cache(1, 6)
    expected = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    kv = KVCache(1, 2, 4, 8, torch.float32, torch.device("cpu"))
    kv.fill(cache, torch.ones(1, 6, dtype=torch.long), torch.tensor([2]))
    larger = kv.grown(32)
    for layer, (keys, values) in enumerate(expected):
        assert torch.equal(larger.keys[layer][:, :, :6], keys)
        assert torch.equal(larger.values[layer][:, :, :6], values)
        assert not larger.keys[layer][:, :, 6:].any()
    assert (larger.filled, larger.lens.tolist(), larger.offset.tolist()) == (6, [6], [2])
    assert (larger.bias == 0).sum() == 6
    assert kv.keys == kv.values == []
