from qwenvl.nodes.clashes import clashes


def node(folder=None):
    kind = type("Node", (), {})
    if folder:
        kind.RELATIVE_PYTHON_MODULE = f"custom_nodes.{folder}"
    return kind


OURS = {"QwenVL": node(), "Qwen": node(), "Qwen2VL": node()}


def test_a_pack_with_some_of_our_ids_is_named_once_with_all_of_them():
    other = node("ComfyUI_Qwen-old")
    assert clashes(OURS, {"QwenVL": other, "Qwen2VL": other, "KSampler": node()}) == {
        "ComfyUI_Qwen-old": ["QwenVL", "Qwen2VL"]
    }


def test_several_packs_are_all_named():
    found = clashes(OURS, {"QwenVL": node("a"), "Qwen": node("b.py")})
    assert found == {"a": ["QwenVL"], "b.py": ["Qwen"]}


def test_our_own_nodes_and_those_of_other_ids_are_no_clash():
    assert clashes(OURS, OURS) == {}
    assert clashes(OURS, {"qwenvl": node("a")}) == {}


def test_a_class_that_says_no_folder_is_named_by_its_module():
    assert clashes(OURS, {"Qwen": node()}) == {__name__: ["Qwen"]}
