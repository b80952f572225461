import pytest
from object_info import differences

TEXT, NUMBER = ["STRING", {"default": "", "tooltip": "A question."}], ["INT", {"min": 1}]
NODE = {
    "input": {"required": {"text": TEXT}, "optional": {"seed": NUMBER}},
    "input_order": {"required": ["text"], "optional": ["seed"]},
    "output": ["STRING", "IMAGE"],
}


def changed(**values):
    """The node with other values for its inputs."""
    optional = {"seed": NUMBER, **values}
    return {**NODE, "input": {**NODE["input"], "optional": optional}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"A": NODE}, []),
        ({}, ["A: {"]),
        ({"A": NODE, "B": 1}, ["B: nothing -> 1"]),
        ({"A": changed(seed=["INT", {"min": 2}])}, ["A > input > optional > seed > options > min: 1 -> 2"]),
        ({"A": changed(seed=["INT", {}])}, ["A > input > optional > seed > options > min: 1 -> nothing"]),
        ({"A": changed(seed=["FLOAT", {"min": 1}])}, ['A > input > optional > seed > type: "INT" -> "FLOAT"']),
        ({"A": changed(more=TEXT)}, ["A > input > optional > more: nothing -> ["]),
        (
            {"A": {**NODE, "input_order": {"required": ["seed"], "optional": ["seed"]}}},
            ['A > input_order > required: ["text"] -> ["seed"]'],
        ),
        ({"A": {**NODE, "output": ["IMAGE", "STRING"]}}, ['A > output: ["STRING", "IMAGE"] -> ["IMAGE", "STRING"]']),
    ],
)
def test_each_difference_is_told_by_node_and_input(now, said):
    found = list(differences({"A": NODE}, now))
    assert len(found) == len(said)
    assert all(line.startswith(beginning) for line, beginning in zip(found, said, strict=True))
