"""web/carry_over.js in Node: workflows of older packs, and of this one, open with every value in its widget."""

import json
import re
import shutil
import subprocess

import pytest
from pictures import ROOT
from saved_workflows import SAVED

NODE = shutil.which("node")
if NODE is None:
    pytest.skip("Install Node.js to try the page's scripts without a browser.", allow_module_level=True)

RUN = """
import { carryOver } from "./web/carry_over.js";
import { readFileSync } from "node:fs";
const nodes = JSON.parse(readFileSync(0));
for (const { info, widgets, sockets } of nodes) carryOver(info, widgets, sockets);
console.log(JSON.stringify(nodes.map(({ info }) => info)));
"""


def fresh(pack, node_id):
    """Name and value of every widget of a new node, as the page makes them, and the names of all inputs."""
    declared = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    inputs = {**declared["required"], **declared["optional"]}
    widgets = []
    for name, (kind, options) in inputs.items():
        if kind not in ("IMAGE", "VIDEO"):
            widgets.append({"name": name, "value": options["default"]})
        if options.get("control_after_generate"):
            widgets.append({"name": "control_after_generate", "value": "randomize"})
    return widgets, list(inputs)


def carry_over_infos(pack, nodes):
    """(id, node as saved) -> the node as the page is handed it."""
    asked = []
    for node_id, info in nodes:
        ours, sockets = fresh(pack, node_id)
        asked.append({"info": {"id": 1, **info}, "widgets": ours, "sockets": sockets})
    command = [NODE, "--input-type=module", "--eval", RUN]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def carry_over(pack, *nodes):
    """(id, node as saved) -> what its widgets then hold by name, and the node as the page is handed it."""
    infos = carry_over_infos(pack, nodes)
    widgets = [{widget["name"]: widget["value"] for widget in fresh(pack, node_id)[0]} for node_id, _ in nodes]
    found = [
        values | dict(zip(values, info["widgets_values"], strict=False))
        for values, info in zip(widgets, infos, strict=True)
    ]
    return list(zip(found, infos, strict=True))


@pytest.fixture(scope="module")
def opened(_comfy_and_pack):
    """Every saved node of the file, opened: one start of Node for all."""
    nodes = []
    for case in SAVED["cases"]:
        pictures = [{"name": name, "link": place} for place, name in enumerate(case.get("pictures", []))]
        saved = {name: case[name] for name in ("widgets_values", "widgets_values_named") if name in case}
        nodes.append((case["id"], {**saved, "inputs": pictures}))
    for layout in SAVED["our_layouts"]:
        values = [SAVED["values"][name] for name in layout["names"].split()]
        nodes.append((layout["id"], {"widgets_values": values}))
    names = [*(case["what"] for case in SAVED["cases"]), *(str(layout) for layout in SAVED["our_layouts"])]
    return dict(zip(names, carry_over(_comfy_and_pack[1], *nodes), strict=True))


@pytest.mark.parametrize("case", SAVED["cases"], ids=lambda case: case["what"])
def test_a_saved_workflow_opens_with_every_value_in_its_widget(opened, case):
    found, info = opened[case["what"]]
    assert {name: found[name] for name in case["expect"]} == case["expect"]
    connected = {case["pictures"][one_input["link"]]: one_input["name"] for one_input in info["inputs"]}
    assert connected == case.get("connected", {})


@pytest.mark.parametrize(
    "layout", SAVED["our_layouts"], ids=lambda value: f"{value['id']} {len(value['names'].split())}"
)
def test_an_order_of_this_pack_opens_as_it_was_saved(opened, pack, layout):
    found, _ = opened[str(layout)]
    expected = {widget["name"]: widget["value"] for widget in fresh(pack, layout["id"])[0]}
    expected |= {name: SAVED["values"][name] for name in layout["names"].split()}
    assert found == expected


def test_a_picture_stays_where_the_node_has_another_one(pack):
    inputs = [{"name": "image", "link": 3}, {"name": "image1", "link": 4}]
    ((_, info),) = carry_over(pack, ("QwenVL", {"widgets_values": [], "inputs": inputs}))
    assert info["inputs"] == inputs


def test_the_lists_of_the_script_hold_what_the_nodes_offer(pack):
    """A choice that the script does not know would make it take today's workflows for old ones."""
    script = (ROOT / "web" / "carry_over.js").read_text(encoding="utf-8")
    known = set(re.findall(r'"([^"]*)"', script))
    for node_id in ("QwenVL", "Qwen"):
        declared = pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
        for name, (kind, _) in {**declared["required"], **declared["optional"]}.items():
            # What is not in the script's table may be anything there.
            if isinstance(kind, list) and f" {name}: oneOf(" in script:
                assert set(kind) <= known, name


ODD = (
    *(
        [None],
        [None, {"name": "image", "link": 3}],
        "image",
        5,
        {"name": "image"},
        [[], 3, "image", {}],
        [{"name": None}],
    ),
)


@pytest.mark.parametrize("values", [[], None, "x", 3, [None], {"model": None}])
def test_inputs_and_values_of_any_kind_stop_no_workflow(pack, values):
    nodes = [("QwenVL", {"widgets_values": values, "inputs": odd}) for odd in ODD]
    nodes += [("QwenVL", {"widgets_values_named": odd, "widgets_values": []}) for odd in (*ODD, values)]
    opened_ = carry_over_infos(pack, nodes)
    assert len(opened_) == len(nodes)
    picture = opened_[1]["inputs"]
    assert picture == [None, {"name": "image1", "link": 3}], "the rest is still brought over"
