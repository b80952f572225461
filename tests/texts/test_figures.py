"""The figures of the documents are those of the lists, the settings and the runs; the errors are the code's own."""

import ast
import dataclasses
import json
import re
from functools import cache

import pytest
from pictures import ROOT
from test_documents import PAGES, README, READMES, names, read

from qwenvl.loading.loader import PICTURE_PIXELS
from qwenvl.models import catalog
from qwenvl.models.engines import Engine
from qwenvl.settings import SETTINGS

RESULTS = ROOT / "benchmarks/results"
# Several models in one row of the table have the same figures.
ROW = re.compile(r"^\| (\S[^|]*?) \| ([\d.]+) GB \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
CARD = re.compile(r"^\| (\d+) GB \| (.*) \|$", re.MULTILINE)
SPEED = re.compile(r"^\|[^|]*\|[^|]*\| [\d.]+ ?[(\uff08].*", re.MULTILINE)
SHAPES = {"64": "nano", "256": "small", "2B": "2b"}
# Of a card, what weights may take at most.
SHARE = 0.8
# Errors that a page explains.
LEAST_ERRORS = {"README.md": 3, "README.zh-CN.md": 3, "docs/troubleshooting.md": 25}

each_readme = pytest.mark.parametrize("document", READMES, ids=names)


def page(name):
    return read(ROOT / "docs" / name)


def one_line(name):
    return " ".join(page(name).split())


def sizes(label):
    """What a model of the list needs, by its name or the beginning of it."""
    model = re.match(r"[\w.-]+", label, re.ASCII)[0]
    known = {name: model.size for name, model in catalog.all_models([]).items()}
    return next(size for name, size in known.items() if name == model or name.startswith(f"{model}-"))


def test_sizes_of_models_are_the_lists():
    rows = ROW.findall(page("models.md"))
    assert len(rows) == 12
    for label, *figures in rows:
        told = "{} GB on disk; in memory none {}, 8bit {}, 4bit {} GB".format(*figures)
        assert str(sizes(label)) == told, label


@each_readme
def test_a_model_fits_the_card_that_it_is_named_for(document):
    rows = CARD.findall(read(document))
    assert len(rows) == 6
    for card, cells in rows:
        for kind, cell in zip(("none", "8bit", "4bit"), cells.split(" | "), strict=True):
            label, figure = cell.split()
            assert figure == f"{sizes(label).memory[kind] / 1e9:.1f}", cell
            assert float(figure) <= int(card) * SHARE, cell


def test_both_languages_say_as_much():
    """The same figures in the same tables, the same pages and pictures, the same commands."""
    for what in (r"\]\(([^)\s]+)\)", r"^\|.*\|$", r"^\d\. ", r"^## ", r"`[^`\n]*[a-z]{3}[^`\n]*`"):
        english, chinese = (re.findall(what, read(document), re.MULTILINE) for document in READMES)
        assert len(english) == len(chinese), what
    english, chinese = (re.findall(r"\d[\d.]*", "".join(SPEED.findall(read(document)))) for document in READMES)
    assert english == chinese
    english, chinese = (CARD.findall(read(document)) for document in READMES)
    assert english == chinese


def test_speeds_are_those_of_the_runs():
    runs = [json.loads(line) for line in (RESULTS / "2026-11-24-amd-epyc-2-cores.jsonl").read_text().splitlines()]
    runs = [run for run in runs if "benchmarks.decode" in run["command"]]
    rows = SPEED.findall(read(README))
    assert len(rows) == 5
    for row in rows:
        model, how, *cells = row.strip("| ").split(" | ")
        shape = next(shape for label, shape in SHAPES.items() if model.split(",")[0].endswith(label))
        told = re.findall(r"[\d.]+", " ".join(cells))
        assert any(
            run["shape"] == shape and run["sampled"] == (how == "sampled") and all(map(rounds_to, told, measured(run)))
            for run in runs
        ), row


def measured(run):
    return [run["tokens_per_s"], *run["tokens_per_s_range"], run["generate_tokens_per_s"], run["ratio"]]


def rounds_to(told, value):
    digits = len(told.partition(".")[2])
    return abs(float(told) - value) <= 0.5 * 10**-digits + 1e-9


def cancel(run):
    took = {name: second["page"] for name, second in run["seconds"].items()}
    yield f"| while the model was read | {took['loading'][1]:.2f} s |"
    yield f"| during the prompt | {took['prompt'][1]:.2f} s |"
    yield f"| during the answer | {took['answer'][1]:.2f} s |"
    yield f"the longest took {max(entry[2] for entry in took.values()):.2f} s"


def soak(run):
    labels = {"100": "100", "1000": "1,000", "2000": "2,000", "2400": "and 200 cancels"}
    for runs, level in run["levels"].items():
        resident = f"{level['resident_bytes'] / 1e6:.0f} MB"
        yield f"| {labels[runs]} | {resident} | {level['files']} | {level['threads']} | {level['tensors']} |"
    yield f"All {run['ends']['right answer']} known answers were right"
    yield f"200 of them were cancelled and {run['ends']['refused']} refused"


def faults(run):
    yield f"at {run['killed']['moments']} random moments"
    yield f"in {run['out_of_memory']['runs_that_ran_out']:,} runs"


def captions(run):
    low, high = run["ratio_range"]
    yield f"{run['pictures_per_s']:.0f} a second in batches against {run['one_by_one_per_s']:.0f} one by one"
    yield f"{run['ratio']} times as fast ({low:.1f} to {high:.1f} in five rounds), with the same {run['same_answers']}"


def precision(run):
    for name, variant in run["variants"].items():
        right, overlap = variant["all"]["percent"], variant["mean_iou"]
        label = name.replace("vision too", "vision tower too")
        yield f"| {label} | {right} % | {overlap:.3f} | {variant['weight_bytes'] / 1e6:.2f} MB |"
    yield f"right answers to {variant['all']['of']:,} questions"


def products(run):
    labels = {"bfloat16": "bfloat16 as it is", "bfloat16, oneDNN's order": "bfloat16 in oneDNN's order"}
    labels |= {
        "int8 twice": "int8",
        "int4 in 32s": "int4, groups of 32",
        "bfloat16, oneDNN off": "bfloat16, torch's own product",
    }
    for name, label in labels.items():
        one, four, many = (run["ms"]["6144 x 1024"][name].get(rows, 0) for rows in ("1", "4", "512"))
        yield f"| {label} | {one:.2f} | {four:.2f} | " + (f"{many:.1f} |" if many else "not measured |")
    yield f"takes {run['attention_ms']['64']:.2f} ms a layer after 64 tokens and {run['attention_ms']['4096']:.1f} ms"


def remote(run):
    stand_in, real = run["stand_in"], run["per_s"]
    beyond = stand_in["overhead_ms"]
    yield f"| text | {beyond['text']['beyond']} ms |"
    yield f"| small picture | {beyond['picture']['beyond']:.0f} ms |"
    yield f"{beyond['photo of 1.4 megapixels']['work_beyond']:.0f} ms of work"
    yield f"({real['16']['ratio']:.1f} times)"
    four, sixteen = (stand_in["per_s"][many]["ratio"] for many in ("4", "16"))
    yield f"answered {four:.1f} times as fast with 4 at a time, and {sixteen:.1f} times with 16"


def fuzz(run):
    yield f"tried {run['executions'] / 1e6:.1f} million inputs"


@pytest.mark.parametrize(
    ("name", "file", "told"),
    [
        ("memory.md", "2026-11-30-cancel-cpu.json", cancel),
        ("memory.md", "2026-11-24-soak-2000-cpu.json", soak),
        ("memory.md", "2026-11-24-faults.json", faults),
        ("speed.md", "2026-11-24-captions-cpu.json", captions),
        ("speed.md", "2026-12-01-products-cpu.json", products),
        ("models.md", "2026-12-01-precision.json", precision),
        ("engines.md", "2026-11-24-remote-cpu.json", remote),
        ("how-it-works.md", "2026-11-24-fuzz.json", fuzz),
    ],
)
def test_figures_are_those_of_the_run_that_is_named(name, file, told):
    text = one_line(name)
    assert f"(../benchmarks/results/{file})" in text
    for sentence in told(json.loads((RESULTS / file).read_text(encoding="utf-8"))):
        assert sentence in text, sentence


def test_comfyuis_speeds_are_those_of_the_runs():
    runs = [json.loads(line) for line in (RESULTS / "2026-11-24-amd-epyc-2-cores.jsonl").read_text().splitlines()]
    # The last ones are those of the quieter hour.
    runs = {run["shape"]: run for run in runs if "benchmarks.comfyui" in run["command"]}
    for side, shape in (("64", "nano"), ("256", "small")):
        rates, ratio = runs[shape]["tokens_per_s"], runs[shape]["ratio_to_comfyui"]
        assert f"| {side} | {rates['ours']} | {rates['comfyui']} | {ratio:.1f} |" in page("speed.md")


def test_speeds_beside_llama_cpp_are_those_of_the_runs():
    """No table in a page without its runs, and no run left out."""
    runs = [json.loads(line) for line in (RESULTS / "2026-12-01-against-cpu.jsonl").read_text().splitlines()]
    rows = [line for line in page("speed.md").splitlines() if re.match(r"\| (none \(bfloat16\)|8bit|4bit) \|", line)]
    expected = []
    for run in runs:
        ours = "none (bfloat16)" if run["quantization"] == "none" else run["quantization"]
        low, high = run["ratio_range"]
        rates = f"{run['ours_tokens_per_s']:.1f} | {run['llama_type']} | {run['llama_tokens_per_s']:.1f}"
        expected.append(f"| {ours} | {run['threads']} | {rates} | {run['ratio']:.2f} ({low:.2f} to {high:.2f}) |")
    assert rows == expected


def test_launches_are_those_of_the_runs():
    runs = [json.loads(line) for line in (RESULTS / "2026-11-24-amd-epyc-2-cores.jsonl").read_text().splitlines()]
    own = {run["launches_per_layer"] for run in runs if run.get("tier") == "own step" and "launches_per_layer" in run}
    assert own, "a run counted them"
    assert {f"launches {count:.0f} kernels for each layer" in one_line("how-it-works.md") for count in own} == {True}


def test_bounds_of_the_same_answer_are_those_of_its_test():
    source = (ROOT / "tests/whole/test_same_answer.py").read_text(encoding="utf-8")
    near, padding = (re.search(form, source, re.MULTILINE)[1] for form in (r"^NEAR = (\d+)", r"bfloat16: ([\d.]+)\}"))
    assert f"by at most {int(near) / 10:.0f} % of the picture" in one_line("how-it-works.md")
    assert f"logits by at most {100 * float(padding):.0f} % of the largest" in one_line("how-it-works.md")


def test_settings_have_the_defaults_and_ranges_that_the_page_says():
    table = page("nodes.md").split("### Inputs")[1].split("### ")[0]
    told = {
        name: (default, meaning)
        for cells, default, meaning in re.findall(r"^\| (`.*?) \| (.*?) ?\| (.*) \|$", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cells)
    }
    assert set(told) == set(SETTINGS)
    for name, setting in SETTINGS.items():
        default, meaning = told[name]
        if setting.default not in (None, ""):
            assert default == shown(setting.default), name
        if setting.span and name != "seed":
            assert "{:.10g} to {:.10g}".format(*setting.span) in meaning, name


def shown(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.10g}" if isinstance(value, int | float) else value


def test_the_settings_of_an_engine_have_the_defaults_that_the_page_says():
    table = page("engines.md").split("## Settings of an entry")[1].split("## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", table, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(Engine) if field.name != "name"}
    assert set(told) == set(fields)
    for name in ("timeout_s", "max_concurrency", "vision", "video_url"):
        assert json.loads(told[name]) == fields[name], name
    assert json.loads(told["pixels"]) == list(PICTURE_PIXELS)


def test_presets_and_models_that_are_named_are_there():
    names_of_ours = page("nodes.md").split("These come with the pack:")[1].split("\n\n")[0]
    ours = {path.stem.replace("_", " ") for path in (ROOT / "qwenvl/prompting/builtin_presets").iterdir()}
    assert {" ".join(name.split()) for name in re.findall(r"\*([^*]+)\*", names_of_ours)} == ours
    for document in (*READMES, *PAGES):
        assert set(re.findall(r'--preset "(.+?)"', read(document))) <= ours
        asked = re.findall(r"--model ([\w.-]+)|serve-info (Q[\w.-]+)|`(Qwen[\w.]+-[\w.-]*B-[\w-]+)`", read(document))
        assert {name for found in asked for name in found if name} - {"NAME"} <= set(catalog.all_models([]))


@pytest.mark.parametrize("name", ["QwenVLLoadFolder", "QwenVLSaveCaptions"])
def test_inputs_of_the_folder_nodes_are_explained(pack, name):
    inputs = pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    widgets = [entry for entry, (_, options) in inputs["required"].items() if not options.get("forceInput")]
    for widget in widgets:
        assert f"\n| `{widget}` |" in page("captions.md"), widget


@pytest.mark.parametrize("document", [*READMES, *PAGES], ids=names)
def test_errors_that_are_explained_are_errors_of_the_code(document):
    cells = re.findall(r"^\| (\*[^*].*?) \|", read(document), re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", cell)]
    assert len(messages) >= LEAST_ERRORS.get(names(document), 0)
    for message in messages:
        parts = [re.escape(part.strip()) for part in re.split(r"…|\bN\b|\bM\b|4bit", message)]
        assert any(re.search(".*".join(parts), text, re.DOTALL) for text in written_in_code()), message


@cache
def written_in_code():
    return {text for file in (ROOT / "nodes.py", *(ROOT / "qwenvl").rglob("*.py")) for text in constants(file)}


def constants(path):
    """The text of each string in a file, an f-string's in one; comments and docstrings are not among them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and id(node) not in told:
            yield str(node.value)
