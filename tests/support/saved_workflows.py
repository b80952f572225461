"""Workflow files as older packs saved them, built from saved_workflows.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAVED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
INNER = "6c0b0c5e-5a3c-4a52-9a5e-0f5f6f0c7b11"


def workflow_of_all_cases() -> dict[str, Any]:
    """Build one file with every saved node of the cases, each with its pictures connected."""
    nodes, links = [], []
    for place, case in enumerate(SAVED["cases"]):
        inputs = []
        for slot, name in enumerate(case.get("pictures", [])):
            source, link = len(nodes) + 1000, len(links) + 1
            links.append([link, source, 0, place + 1, slot, "IMAGE"])
            inputs.append({"name": name, "type": "IMAGE", "link": link})
            output = {"name": "IMAGE", "type": "IMAGE", "links": [link], "slot_index": 0}
            nodes.append(saved_node(source, "LoadImage", [-600, place * 900], outputs=[output], inputs=[]))
            nodes[-1]["widgets_values"] = ["circle.png", "image"]
        saved = {name: case[name] for name in ("widgets_values", "widgets_values_named") if name in case}
        outputs = [{"name": "text", "type": "STRING", "links": None}]
        nodes.append({**saved_node(place + 1, case["id"], [place * 500, 0], inputs=inputs, outputs=outputs), **saved})
    return {"nodes": nodes, "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4} | {
        "last_node_id": 2000,
        "last_link_id": len(links),
    }


def saved_node(number: int, node_id: str, place: list[int], **more: Any) -> dict[str, Any]:
    size = {"size": [400, 600], "flags": {}, "order": number, "mode": 0, "properties": {}}
    return {"id": number, "type": node_id, "pos": place, **size, **more}


def in_a_subgraph(case: dict[str, Any]) -> dict[str, Any]:
    """Build a file that holds only a subgraph with the case's node."""
    node = saved_node(7, case["id"], [100, 100], inputs=[], outputs=[])
    subgraph = {
        "id": INNER,
        "version": 1,
        "revision": 0,
        "config": {},
        "name": "Inner",
        "extra": {},
        "state": {"lastGroupId": 0, "lastNodeId": 7, "lastLinkId": 0, "lastRerouteId": 0},
        "inputNode": {"id": -10, "bounding": [0, 0, 120, 60]},
        "outputNode": {"id": -20, "bounding": [9, 0, 120, 60]},
        "inputs": [],
        "outputs": [],
        "widgets": [],
        "groups": [],
        "links": [],
        "nodes": [{**node, "widgets_values": case["widgets_values"]}],
    }
    outer = saved_node(1, INNER, [0, 0], inputs=[], outputs=[])
    return {
        "nodes": [outer],
        "links": [],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
        "last_node_id": 1,
        "last_link_id": 0,
        "definitions": {"subgraphs": [subgraph]},
    }
