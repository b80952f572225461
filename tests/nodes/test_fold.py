"""web/fold.js in Node.js: which settings of a node are in sight, and that saved values stay in their places."""

import pytest
from page_scripts import lay_out, run

BEGIN = """
const { addFold } = await import("./extensions/qwenvl/fold.js");
const { declare } = await import("./extensions/qwenvl/first_values.js");
const { show } = await import("./extensions/qwenvl/answer.js");
const { widgets } = given;
declare({ input: { required: Object.fromEntries(widgets.map(({ name, options }) => [name, ["any", options]])) } });
const make = (all = false) => {
  const node = new Node(widgets);
  addFold(node, all);
  return node;
};
"""
FEW = ["text", "model", "quantization", "max_new_tokens", "seed", "thinking", "image_mode", "preset"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("page"))


@pytest.fixture
def fold(scripts, pack):
    """Runs a script on the widgets that QwenVL declares."""
    declared = pack.NODE_CLASS_MAPPINGS["QwenVL"].INPUT_TYPES()
    inputs = {**declared["required"], **declared["optional"]}
    widgets = [
        {"name": name, "value": options["default"], "options": {"advanced": options.get("advanced", False)}}
        for name, (kind, options) in inputs.items()
        if kind not in ("IMAGE", "VIDEO")
    ]

    def run_(script, **more):
        return run(scripts, BEGIN + script, {"widgets": widgets, **more})

    run_.names = [widget["name"] for widget in widgets]
    run_.values = [widget["value"] for widget in widgets]
    return run_


def test_few_settings_are_in_sight_until_the_button_is_pressed(fold):
    script = """
    const node = make(given.all);
    const look = () => seen.push([node.seen, node.widgets.at(-1).label, node.size[1]]);
    look();
    node.press("qwenvl_more");
    look();
    node.press("qwenvl_more");
    look();
    """
    few, every = [*FEW, "qwenvl_more"], [*fold.names, "qwenvl_more"]
    height = {len(names): 40 + 24 * len(names) for names in (few, every)}
    folded = [few, "more settings  ▾", height[len(few)]]
    whole = [every, "fewer settings  ▴", height[len(every)]]
    assert fold(script, all=False) == [folded, whole, folded], "what is hidden takes no room"
    assert fold(script, all=True) == [whole, folded, whole]


CHANGES = {
    "by another script or a panel": 'node.widgets.find(({ name }) => name === "top_p").value = 0.5;',
    "by a saved workflow": "node.configure({ widgets_values: given.values });",
    "by a connection": 'node.inputs.push({ widget: { name: "top_p" }, link: 3 }); node.onConnectionsChange();',
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_that_is_changed_comes_out_and_the_node_has_room_for_it(fold, change):
    script = f"""
    const node = make();
    const before = node.size[1];
    {CHANGES[change]}
    node.draw();
    seen.push(node.seen, node.size[1] - before);
    """
    values = [0.5 if name == "top_p" else value for name, value in zip(fold.names, fold.values, strict=True)]
    names, more = fold(script, values=values)
    assert names == [name for name in [*fold.names, "qwenvl_more"] if name in ("top_p", "qwenvl_more", *FEW)]
    # A saved node has its saved size, and a socket its row: only what nobody tells of makes it grow.
    assert more == (24 if change == "by another script or a panel" else 0)


def test_it_stays_in_sight_until_it_is_as_at_first_and_the_node_is_folded_anew(fold):
    script = """
    const node = make();
    const top = node.widgets.find(({ name }) => name === "top_p");
    const first = top.value;
    top.value = 0.5;
    node.draw();
    top.value = first;
    node.draw(); // not under the pointer that sets it
    seen.push(node.seen.includes("top_p"));
    node.onConnectionsChange();
    seen.push(node.seen.includes("top_p"));
    """
    assert fold(script) == [True, False]


def test_the_pages_own_button_folds_too(fold):
    """That of nodes drawn as HTML: it sets showAdvanced and tells nobody."""
    script = """
    const node = make();
    const look = () => seen.push([node.seen.length, node.widgets.at(-1).label]);
    for (const all of [true, false]) {
      node.showAdvanced = all;
      node.draw();
      look();
    }
    """
    assert fold(script) == [[len(fold.names) + 1, "fewer settings  ▴"], [len(FEW) + 1, "more settings  ▾"]]


def test_where_a_page_knows_places_of_a_widget_it_is_hidden_on_the_canvas_alone(fold):
    """As pages from 1.58 on do, which call a widget hidden too while it is connected."""
    script = """
    const node = new Node(widgets);
    for (const widget of node.widgets) {
      widget.visibility = {};
      Object.defineProperty(widget, "hidden", {
        get: () => node.inputs.some((input) => input.widget.name === widget.name),
        set: () => seen.push(`${widget.name} is hidden everywhere`),
      });
    }
    addFold(node, false);
    const folded = () => node.widgets.filter(({ advanced }) => advanced).map(({ name }) => name);
    seen.push(folded());
    node.inputs.push({ widget: { name: "top_p" }, link: 3 });
    node.onConnectionsChange();
    seen.push(folded().includes("top_p"));
    const drawn = node.drawn;
    node.draw();
    seen.push(node.drawn - drawn);
    """
    rare = [name for name in fold.names if name not in FEW]
    assert fold(script) == [rare, False, 0]


def test_a_node_that_the_user_has_made_larger_stays_so(fold):
    script = """
    const node = make();
    node.setSize([900, 2000]);
    node.widgets.find(({ name }) => name === "top_p").value = 0.5;
    node.draw();
    seen.push(node.size);
    """
    assert fold(script) == [[900, 2000]]


def test_saved_values_stay_by_position(fold):
    """Of a node with a button and an answer, folded and not: as many values as it declares, in their order."""
    script = """
    const node = make();
    show(node, { state: "done", text: "a red circle" });
    seen.push(node.serialize().widgets_values);
    node.configure({ widgets_values: given.values });
    node.press("qwenvl_more");
    const saved = node.serialize();
    seen.push(saved.widgets_values);
    const other = make();
    other.configure(saved);
    seen.push(other.serialize().widgets_values);
    other.configure({ widgets_values: widgets.map(({ value }) => value), showAdvanced: saved.showAdvanced });
    seen.push(other.seen);
    seen.push(node.widgets.filter(({ serialize }) => serialize === false).map(({ options }) => options.serialize));
    """
    values = [f"value of {name}" for name in fold.names]
    fresh, saved, opened, sight, sent = fold(script, values=values)
    assert fresh == fold.values
    assert saved == opened == values
    assert sight == [*fold.names, "qwenvl_more"], "it opens as it was saved: with all settings"
    assert sent == [False, False], "prompts that are queued leave the button and the answer out"


def test_what_others_do_with_the_node_is_still_done(fold):
    script = """
    const node = new Node(widgets);
    for (const name of ["onConfigure", "onConnectionsChange", "onDrawBackground"]) {
      node[name] = function (...given) { seen.push([name, this === node, given.length]); };
    }
    addFold(node, false);
    node.configure({ widgets_values: [] });
    node.onConnectionsChange(1, 2, 3);
    node.onDrawBackground("context");
    """
    hooks = [("onConfigure", 1), ("onConnectionsChange", 3), ("onDrawBackground", 1)]
    assert fold(script) == [[name, True, count] for name, count in hooks]


def test_a_node_without_rare_settings_has_no_button(scripts):
    assert run(scripts, BEGIN + "seen.push(make().seen);", {"widgets": [{"name": "text", "value": ""}]}) == [["text"]]
